"""Every option that exists. Presets beside this file hold overrides only; the command line overrides both:

    accelerate launch train.py --config config/emoji.py:compressibility --config.seed=1 --config.train.clip_range=1e-3

Options marked (memory) change speed and memory, never the result.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.run_dir = ""  # the run's own folder; empty: runs/PRESET-TIME
    config.resume = ""  # the folder of a run to continue, from its newest checkpoint
    config.seed = 0  # (seed, epoch, sample) determines each prompt and all noise
    config.num_epochs = 100  # each samples images, scores them and updates the weights
    config.tracker = ""  # "wandb" or "tensorboard", in addition to metrics.jsonl
    config.save_every = 10  # epochs between checkpoints; the last epoch is always saved
    config.keep_checkpoints = 2  # older ones are removed; 0 keeps all
    config.grid_every = 5  # epochs between image grids of the same prompts and noise; 0: only the first and last
    config.grid_images = 18
    config.threads = 0  # (memory) CPU threads per process, for runs on a CPU; 0: cores / processes

    config.model = "CompVis/stable-diffusion-v1-4"  # hub name or folder; pipelines: see ddpo/models.py
    config.lora_rank = 4  # 0: full finetuning
    config.lora_targets = "to_q,to_k,to_v,to_out.0"  # module names of the denoiser, comma-separated
    config.precision = "fp32"  # of the network: fp32, tf32, bf16, fp16. Trained weights are float32 in all
    config.compile = False  # (memory) torch.compile: takes minutes at the start; ends the run if its gradient is wrong
    # Of ddpo/losses.py. On the denoising steps: ddpo_is, ddpo_mask, ddpo_smooth, ddpo_sf. On the finished image: rwr,
    # rwr_sparse, best_of_n, awm, nft, ram, dpo. For generators of one step: drpo
    config.algorithm = "ddpo_is"
    config.advantage = "per_prompt"  # of ddpo/stat_tracking.py: per_prompt, per_group, leave_one_out, whole_epoch
    config.reward = "jpeg_compressibility"  # of ddpo/rewards.py: NAME, NAME:MODEL, or "pickscore + 0.1*hpsv2"
    config.reward_timeout = 0.0  # seconds that scoring sample.batch_size images may take; 0: no limit
    config.prompts = "imagenet_animals"  # of ddpo/prompts.py, or a file: one prompt per line, or JSON lines
    config.held_out = 0.0  # share of the prompts that is kept out of training, for evaluation
    config.choices = ""  # scripts.train_dpo: the choices.jsonl of scripts.annotate to learn from, comma-separated
    config.choices_loss = "dpo"  # scripts.train_dpo: dpo, or sft: supervised finetuning on the chosen images
    config.held_out_choices = 0.0  # scripts.train_dpo: share of the pairs that is kept out of training, for evaluation

    config.sample = sample = ConfigDict()
    sample.images_per_epoch = 256  # reward queries per epoch, over all processes
    sample.images_per_prompt = 1  # consecutive samples that share a prompt
    sample.batch_size = 8  # (memory) images per forward pass and process; 0: as train.batch_size; both 0: what fits
    sample.num_steps = 50  # T, denoising steps
    sample.guidance_scale = 5.0  # classifier-free guidance in sampling and in training; 1: none
    sample.eta = 1.0  # DDIM models: noise of each step, 0 to 1; algorithms on the denoising steps need eta > 0
    sample.step_kind = "sde"  # flow models (SD 3.x, FLUX): kind of step in ddpo/flow_logprob.py: sde, cps, dance
    sample.noise_level = 0.7  # flow models: noise of each step; the authors use 0.7 (sde), 0.8 (cps), 0.3 (dance)
    sample.shift = 0.0  # flow models: shift of the noise levels towards noise; 0: the model's own
    sample.averaged = False  # algorithms on the finished image: sample with the moving average (train.ema_decay)
    sample.height = 0  # pixels; 0: the model's own size
    sample.width = 0

    config.reward_options = options = ConfigDict()  # for rewards that run a model
    options.precision = "fp32"  # of their networks: fp32 (on a GPU as exact as config.precision), bf16, fp16
    options.batch_size = 32  # (memory) images per forward pass
    options.aesthetic_clip = "openai/clip-vit-large-patch14"  # what the aesthetic head was trained on
    options.bertscore_model = "microsoft/deberta-xlarge-mnli"  # for alignment
    options.bertscore_layer = 40  # the layer whose output is compared; BERTScore's choice for that model
    options.vlm_name = ""  # a model's name at an alignment:http://... server; empty: the first that it lists
    options.timeout = 60.0  # seconds that one request to such a server may take
    options.concurrency = 16  # requests to it at a time
    options.max_unusable = 0.5  # share of a batch whose answers may be empty, refused, filtered or cut off

    config.stats = stats = ConfigDict()  # for the advantage per_prompt, see ddpo/stat_tracking.py
    stats.buffer_size = 32  # rewards kept per prompt
    stats.min_count = 16  # with fewer rewards, a prompt is normalised by the whole epoch
    stats.shrinkage = 0.0  # instead of min_count: rewards like the epoch's, added to a prompt's statistics; 0: off
    stats.max_age = 10  # epochs after which a kept reward is forgotten; 0: never (the paper)

    config.train = train = ConfigDict()
    train.updates_per_epoch = 4  # optimizer steps per pass over the epoch's samples
    train.inner_epochs = 1  # passes over the epoch's samples
    train.batch_size = 8  # (memory) transitions x_t -> x_{t-1} per forward and backward pass and process; 0: see above
    train.gradient_checkpointing = False  # (memory) recompute activations in the backward pass: slower, far less memory
    train.learning_rate = 3e-4
    train.warmup_updates = 0  # over which the rate rises to that, since Adam's first updates move every weight by it
    train.adam_beta1 = 0.9
    train.adam_beta2 = 0.999
    train.adam_weight_decay = 1e-4
    train.adam_epsilon = 1e-8
    train.max_grad_norm = 1.0
    train.clip_range = 1e-4  # ddpo_is, awm: the ratio is clipped to 1 +- this; depends on the latent's size, see docs
    train.kl_range = 1e-3  # limit (ddpo_mask) or scale (ddpo_smooth) of a step's divergence from the old policy
    train.target_kl = 0.0  # ends an epoch's updates once their mean kl_old exceeds this; 0: never
    train.inverse_temperature = 5.0  # rwr: a sample weighs exp(this * reward)
    train.keep_percentile = 90.0  # rwr_sparse: samples from this percentile of the rewards on are kept
    train.weight_per_prompt = False  # rwr, rwr_sparse: compare a sample with those of its prompt only
    train.draws = 1  # algorithms on the finished image: draws of (timestep, noise) per image and inner epoch
    train.prompt_dropout = 0.1  # the same: share of the draws trained without their prompt, as base models are
    train.anchor_weight = 0.1  # awm: weight of the squared distance from the outputs of the policy that sampled
    train.nft_beta = 1.0  # nft: how far the implicit policies lie from the one that sampled
    train.ram_scale = 1.0  # ram: how far an advantage of 1 moves the target, in errors of the old prediction
    train.dpo_beta = 500.0  # dpo, scripts.train_dpo: Diffusion-DPO's beta; larger keeps the policy nearer to the base
    train.reference_weight = 0.2  # drpo: weight of the force towards the base model's images; that of the rewards has 1
    train.drift_model = ""  # drpo: model whose frozen UNet makes features of the latents; empty: config.model
    train.advantage_clip = 5.0  # advantages are clipped to +-this
    train.timestep_fraction = 1.0  # share of the T steps that are trained on
    train.timestep_choice = "random"  # which: random or window, drawn again for each update, or first: the noisiest
    train.guidance = True  # False: guidance in sampling only; the old log-probs are computed again without it
    train.kl_weight = 0.0  # weight of each step's KL from the base model in the loss (DPOK); costs a forward pass.
    # Algorithms on the finished image: of the squared distance from the base model's output. drpo: from its image
    train.sigma_weighting = False  # log-ratio * sigma_t / its mean; without, steps with little noise are clipped first
    train.ema_decay = 0.0  # decay of the moving average of the weights, which is evaluated and saved; 0: no average

    config.evaluate = evaluate = ConfigDict()  # see ddpo/evaluation.py; it does not change training
    evaluate.every = 0  # epochs between evaluations, which go to RUN/evaluation.jsonl; 0: none
    evaluate.rewards = ""  # besides the run's own, comma-separated: those that it is not trained on
    evaluate.prompts = ""  # prompt set to evaluate as held out; empty: what config.held_out keeps out of training
    evaluate.limit = 30  # at most this many prompts of those trained on, and of those held out
    evaluate.count = 2  # images per prompt, with the sampler's noise and again without
    evaluate.clip = ""  # CLIP model whose embeddings measure diversity; empty: none
    evaluate.classifier = ""  # models/emoji/classifier or one like it, which names the animal; empty: none
    return config.lock()  # a preset that misspells a key fails


def choose_variant(variant, variants):
    """variants[variant] of a preset, or a ValueError that names all."""
    if variant not in variants:
        raise ValueError(f"unknown variant {variant!r}: there is {', '.join(variants)}")
    return variants[variant]
