// What every op needs at its border with PyTorch: shape checks, dtype dispatch, the current stream.
//
// Only LibTorch's stable ABI is used, so one build serves every torch from 2.10 on and every Python.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace lightseq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The reference in Python has checked shapes and said what is wrong; what is checked here would be our own mistake.
#define LIGHTSEQ_EXPECT(condition) STD_TORCH_CHECK(condition, __func__, ": expected " #condition)

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

template <typename T>
T* data(const Tensor& tensor) {
  return reinterpret_cast<T*>(tensor.data_ptr());
}

// Calls f(T{}) with the CUDA type of `tensor`: float, half or bfloat16.
template <typename F>
void dispatch(const char* op, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, op, ": on CUDA the dtype must be float32, float16 or bfloat16");
  }
}

// The same for 16 bits, which the tensor cores multiply.
template <typename F>
void dispatch_16_bits(const char* op, const Tensor& tensor, F&& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, op, ": on CUDA the dtype must be float16 or bfloat16");
  }
}

}  // namespace lightseq
