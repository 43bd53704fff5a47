"""Every option that exists. Presets beside this file hold overrides only; the command line overrides both:

    accelerate launch train.py --config config/emoji.py:compressibility --config.seed=1 --config.train.clip_range=1e-3

Options marked (memory) change speed and memory, never the result.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.run_dir = ""  # the run's own folder; empty: runs/PRESET-TIME
    config.resume = ""  # a run's folder, to go on from its newest checkpoint
    config.seed = 0  # (seed, epoch, sample) determines each prompt and all noise
    config.num_epochs = 100  # of sampling and updating
    config.tracker = ""  # "wandb" or "tensorboard", beside metrics.jsonl
    config.save_every = 10  # epochs between checkpoints; the last epoch is always saved
    config.keep_checkpoints = 2  # older ones are removed; 0 keeps all
    config.grid_every = 5  # epochs between picture grids of the same prompts and noise; 0: only first and last
    config.grid_images = 18
    config.threads = 0  # (memory) CPU threads a process; 0: cores / processes. For CPU runs only

    config.model = "CompVis/stable-diffusion-v1-4"  # hub name or folder; pipelines: see ddpo/models.py
    config.lora_rank = 4  # 0: full finetuning
    config.lora_targets = "to_q,to_k,to_v,to_out.0"  # module names of the denoiser, comma-separated
    config.precision = "fp32"  # of the network: fp32, tf32, bf16, fp16. Trained weights are float32 in all
    config.compile = False  # (memory) torch.compile: minutes at the start; refused if the gradient is wrong
    # Of ddpo/losses.py. On the denoising steps: ddpo_is, ddpo_mask, ddpo_smooth, ddpo_sf. On the finished picture: rwr,
    # rwr_sparse, best_of_n, awm, nft, ram, dpo. On generators of one step: drpo
    config.algorithm = "ddpo_is"
    config.advantage = "per_prompt"  # of ddpo/stat_tracking.py: per_prompt, per_group, leave_one_out, whole_epoch
    config.reward = "jpeg_compressibility"  # of ddpo/rewards.py: NAME, NAME:MODEL, or "pickscore + 0.1*hpsv2"
    config.reward_timeout = 0.0  # seconds that scoring sample.batch_size pictures may take; 0: no limit
    config.prompts = "imagenet_animals"  # of ddpo/prompts.py, or a file: text, a prompt a line, or JSON lines
    config.held_out = 0.0  # share of the prompts that is kept from training, to be evaluated on
    config.choices = ""  # scripts.train_dpo: the choices.jsonl of scripts.annotate to learn from, comma-separated
    config.choices_loss = "dpo"  # how it does: dpo, or sft, finetuning on the chosen pictures
    config.held_out_choices = 0.0  # share of their pairs that is kept from training, to be measured on

    config.sample = sample = ConfigDict()
    sample.images_per_epoch = 256  # reward queries an epoch, over all processes
    sample.images_per_prompt = 1  # consecutive samples that share a prompt
    sample.batch_size = 8  # (memory) images per forward pass and process; 0: what fits, equal to train.batch_size
    sample.num_steps = 50  # T, denoising steps
    sample.guidance_scale = 5.0  # classifier-free guidance in sampling and in training; 1: none
    sample.eta = 1.0  # DDIM: noise of a step; algorithms on the denoising steps need a distribution, so eta > 0
    sample.step_kind = "sde"  # flow models (SD 3.x, FLUX): step of ddpo/flow_logprob.py: sde, cps, dance
    sample.noise_level = 0.7  # flow models: noise of a step; its authors use 0.7 (sde), 0.8 (cps), 0.3 (dance)
    sample.shift = 0.0  # flow models: of the noise levels, towards noise; 0: the model's own
    sample.averaged = False  # algorithms on the finished picture: draw it by the moving average (train.ema_decay)
    sample.height = 0  # pixels; 0: the model's own size
    sample.width = 0

    config.reward_options = options = ConfigDict()  # of rewards that run a model
    options.precision = "fp32"  # of their networks: fp32 (on a GPU as exact as config.precision), bf16, fp16
    options.batch_size = 32  # (memory) images per forward pass
    options.aesthetic_clip = "openai/clip-vit-large-patch14"  # what the aesthetic head was trained on
    options.bertscore_model = "microsoft/deberta-xlarge-mnli"  # for alignment
    options.bertscore_layer = 40  # of it, whose output is compared; BERTScore's choice for that model
    options.vlm_name = ""  # a model's name at an alignment:http://... server; empty: the first that it lists
    options.timeout = 60.0  # seconds that one request to such a server may take
    options.concurrency = 16  # requests at a time
    options.max_unusable = 0.5  # share of a batch whose answers may be empty, refused, filtered or cut off

    config.stats = stats = ConfigDict()  # of the advantage per_prompt, see ddpo/stat_tracking.py
    stats.buffer_size = 32  # rewards kept per prompt
    stats.min_count = 16  # below that many, a prompt is normalised by the whole epoch
    stats.shrinkage = 0.0  # instead of min_count: rewards of the whole epoch that count as a prompt's own; 0: off
    stats.max_age = 10  # epochs after which a kept reward is forgotten; 0: never (the paper)

    config.train = train = ConfigDict()
    train.updates_per_epoch = 4  # optimizer steps per pass over the epoch's samples
    train.inner_epochs = 1  # passes over the epoch's samples
    train.batch_size = 8  # (memory) transitions (x_t, t, x_t-1) per forward and backward pass and process; 0: see above
    train.gradient_checkpointing = False  # (memory) recompute activations in the backward pass: slower, far smaller
    train.learning_rate = 3e-4
    train.warmup_updates = 0  # over which that is reached; Adam's first steps would else move every weight by all of it
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.999
    train.adam_weight_decay = 1e-4
    train.adam_epsilon = 1e-8
    train.max_grad_norm = 1.0
    train.clip_range = 1e-4  # ddpo_is: of a step's importance ratio; tied to the latent's size, see docs
    train.kl_range = 1e-3  # ddpo_mask, ddpo_smooth: limit, or scale, of a step's divergence from the old policy
    train.target_kl = 0.0  # ends an epoch's updates once their mean kl_old exceeds this; 0: never
    train.inverse_temperature = 5.0  # rwr: a sample weighs exp(this * reward)
    train.keep_percentile = 90.0  # rwr_sparse: of the rewards, above which a sample is kept
    train.weight_per_prompt = False  # rwr, rwr_sparse: compare a sample with those of its prompt, not of the epoch
    train.draws = 1  # algorithms on the finished picture: timesteps and noises a picture and inner epoch is noised with
    train.prompt_dropout = 0.1  # the same: share of draws trained without prompt, as the base model was
    train.anchor_weight = 0.1  # awm: of the squared distance from the outputs of the policy that sampled
    train.nft_beta = 1.0  # nft: how far the implicit policies lie from the one that sampled
    train.ram_scale = 1.0  # ram: how far an advantage of 1 moves the target, in the old prediction's errors
    train.dpo_beta = 500.0  # dpo, train_dpo: inverse temperature of an error's excess over the base model's
    train.reference_weight = 0.2  # drpo: of the force towards the base model's pictures, beside that of the rewards
    train.drift_model = ""  # drpo: model whose frozen UNet sees the pictures' latents; empty: config.model
    train.advantage_clip = 5.0  # advantages are clipped to +-this
    train.timestep_fraction = 1.0  # share of the T steps that are trained on
    train.timestep_choice = "random"  # which: random, window, first; the former two drawn anew for each update
    train.guidance = True  # False: guidance in sampling only; training scores the steps again without
    train.kl_weight = 0.0  # of each step's KL from the base model, added to the loss (DPOK); a second forward pass.
    # On the finished picture: of the squared distance from the base model's output
    train.sigma_weighting = False  # log-ratio * sigma_t / its mean: steps with little noise would else be clipped first
    train.ema_decay = 0.0  # of the moving average of the weights that is drawn and saved; 0: the weights themselves

    config.evaluate = evaluate = ConfigDict()  # see ddpo/evaluation.py; it changes nothing in training
    evaluate.every = 0  # epochs between evaluations, which go to RUN/evaluation.jsonl; 0: none
    evaluate.rewards = ""  # beside the run's own, comma-separated: what it is not trained on
    evaluate.prompts = ""  # prompt set that is evaluated as held out; empty: what config.held_out keeps from training
    evaluate.limit = 30  # prompts at most, of those trained on and of those held out
    evaluate.count = 2  # pictures per prompt, with the sampler's noise and again without
    evaluate.clip = ""  # CLIP model whose embeddings diversity is measured by; empty: none
    evaluate.classifier = ""  # models/emoji/classifier or one like it, to name the prompt's animal; empty: none
    return config.lock()  # a preset that misspells a key fails


def choose_variant(variant, variants):
    """variants[variant] of a preset, or a ValueError that names all."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}: there is {', '.join(variants)}")
    return variants[variant]
