import pytest
import torch

from fused_resnet.bench.kernel_classes import CLASSES, OTHER, classify
from fused_resnet.bench.network import NetworkStep, Workload
from fused_resnet.bench.peers import STOCK_PEER, Peer
from fused_resnet.bench.profile import GAPS, idle, seconds_by_class

CPU = torch.device("cpu")

# as profilers of Ampere and Hopper GPUs list them
KERNELS = {
    "conv fprop": (
        "_fprop_act_kernel",
        "_conv_stats_kernel",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
        "execute_segment_k_off_kernel__5x_cudnn",
        "sm80_xmma_fprop_implicit_gemm_indexed_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x64x64_stage3_warpsize2x2x1_"
        "g1_tensor16x8x16_kernel_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_64x64_64x5_nhwc_align8>("
        "cutlass_tensorop_bf16_s16816fprop_optimized_bf16_64x64_64x5_nhwc_align8::Params)",
    ),
    "conv dgrad": (
        "_dgrad_kernel",
        "_conv_add_grad_kernel",
        "sm80_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_stage4_warpsize2x2x1_g1_"
        "tensor16x8x16_kernel_cudnn",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_f16_s16816dgrad_optimized_f16_128x128_32x4_nhwc_unity_stride_"
        "align8>(cutlass_tensorop_f16_s16816dgrad_optimized_f16_128x128_32x4_nhwc_unity_stride_align8::Params)",
    ),
    "conv wgrad": (
        "_wgrad_kernel",
        "_gram_kernel",
        "sm90_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_"
        "execute_kernel__5x_cudnn",
        "void cudnn::cnn::wgrad_alg0_engine<float, 128, 5, 5, 3, 3, 3, false, 512>(int, int, int)",
    ),
    "norm": (
        "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var, c10::BFloat16, float, 4>("
        "c10::BFloat16 const*, float*, float*, float volatile*, int*, int, int, float)",
        "void at::native::batch_norm_backward_elemt_channels_last_kernel<4, c10::BFloat16, float, float>(...)",
        "void cudnn::batchnorm_bwtr_nhwc_semiPersist<__half, float, float2, 512, true, 1, 32, 2, 1>(...)",
        "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>(...)",
        "triton_poi_fused__native_batch_norm_legit_functional_add_relu_12",
        "triton_red_fused__native_batch_norm_legit_functional_native_batch_norm_backward_threshold_backward_7",
        "_stats_kernel",
        "_backward_kernel",
        "_add_masked_kernel",
        "_masked_grad_kernel",
        "_centre_kernel",
        "_gram_stats_kernel",
        "_finish_weights_kernel",
        "_finish_mixing_kernel",
        "void fused_resnet::cuda::reduce_kernel<__nv_bfloat16, 8>(fused_resnet::Arguments)",
    ),
    "pool": (
        "void at::native::(anonymous namespace)::max_pool_backward_nhwc<c10::BFloat16, float>(c10::BFloat16 const*)",
        "triton_poi_fused_max_pool2d_with_indices_3",
        "_pool_kernel",
        "_pool_backward_kernel",
    ),
    "pointwise": (
        "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>, "
        "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)",
        "void at::native::vectorized_elementwise_kernel<8, at::native::(anonymous namespace)::launch_clamp_scalar("
        "at::TensorIteratorBase&, c10::Scalar, c10::Scalar, at::native::detail::ClampLimits)::{lambda()#1}>(int)",
        "triton_poi_fused_add_relu_threshold_backward_4",
    ),
    "cast, copy": (
        "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::"
        "{lambda()#3}::operator()() const::{lambda()#12}>(int)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase"
        "&)::{lambda(float)#1}, std::array<char*, 2ul> >(int)",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float, false, true>(...)",
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "TensorListMetadata<2>, at::native::(anonymous namespace)::CopyFunctor<c10::BFloat16, float, 2, 1, 1>>(...)",
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "triton_poi_fused__to_copy_1",
    ),
    "matmul": (
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_"
        "cublas",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16>(...)",
    ),
    "optimizer": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "TensorListMetadata<3>, at::native::(anonymous namespace)::FusedSgdMathFunctor<float, 3>, double, float*>(...)",
    ),
    "loss": (
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, float, float, float, at::native::(anonymous "
        "namespace)::LogSoftMaxForwardEpilogue>(float*, float const*, int)",
        "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float, float, long>(...)",
    ),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_kernels_are_known_by_their_names(kind, name):
    assert kind in CLASSES
    assert classify(name, "cuda") == kind


def test_an_unknown_name_is_other():
    assert classify("void somebody::elses(int)", "cuda") == OTHER


@pytest.mark.parametrize("peer", [STOCK_PEER, Peer("fused", "auto")], ids=str)
def test_every_operation_of_a_step_on_the_cpu_has_a_class(peer, tmp_path):
    step = NetworkStep(Workload("resnet20", 4, 16, "bf16", CPU), peer)
    step()
    seconds = seconds_by_class(step, CPU, steps=2, trace=tmp_path / "trace.json")
    assert {"conv fprop", "conv backward", "norm", "optimizer", "loss", "matmul", "host", GAPS} <= seconds.keys()
    assert OTHER not in seconds
    assert (tmp_path / "trace.json").stat().st_size > 1000


@pytest.mark.parametrize(
    ("intervals", "gaps"),
    [
        ([], 0),
        ([(1, 4)], 0),
        ([(1, 4), (6, 7), (7, 9)], 2),
        ([(6, 7), (1, 4)], 2),
        ([(0, 10), (2, 3), (12, 13)], 2),
    ],
)
def test_gaps_are_when_nothing_runs(intervals, gaps):
    assert idle(intervals) == gaps
