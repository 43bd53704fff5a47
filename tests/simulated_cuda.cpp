// What torch asks of a GPU: whether it is there, and streams, of which the simulated one has one, always done.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

struct SimulatedGuard final : impl::DeviceGuardImplInterface {
  static constexpr DeviceType kType = DeviceType::CUDA;
  static Stream only(Device device) { return Stream(Stream::DEFAULT, device); }
  mutable Device current{kType, 0};

  DeviceType type() const override { return kType; }
  DeviceIndex deviceCount() const noexcept override { return 8; }
  Device getDevice() const override { return current; }
  void setDevice(Device device) const override { current = device; }
  void uncheckedSetDevice(Device device) const noexcept override { current = device; }
  Device exchangeDevice(Device device) const override { return std::exchange(current, device); }
  Stream getStream(Device device) const noexcept override { return only(device); }
  Stream getDefaultStream(Device device) const override { return only(device); }
  Stream getNewStream(Device device, int) const override { return only(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, SimulatedGuard);

namespace at {

struct CUDAHooks : CUDAHooksInterface {  // torch finds them by this name
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 8; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
