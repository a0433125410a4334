"""What a kernel is for, told by its name: a table of patterns, the first that is found decides."""

import re

FPROP, DGRAD, WGRAD, CONV_BACKWARD = "conv fprop", "conv dgrad", "conv wgrad", "conv backward"
NORM, POOL, POINTWISE, CAST = "norm", "pool", "pointwise", "cast, copy"
MATMUL, OPTIMIZER, LOSS, HOST, OTHER = "matmul", "optimizer", "loss", "host", "other"

# in the order in which a table shows them
CLASSES = (FPROP, DGRAD, WGRAD, CONV_BACKWARD, NORM, POOL, POINTWISE, CAST, MATMUL, OPTIMIZER, LOSS, HOST, OTHER)

# Kernels of CUDA: cuDNN's and CUTLASS's, ATen's, Inductor's (triton_poi, _red, _per, _tem), this package's.
CUDA_PATTERNS = (
    # cuDNN names the direction; stride > 1 dgrads and 1x1 layers too
    (r"dgrad|convolve_dgrad|bwd_data", DGRAD),
    (r"wgrad|bwd_filter", WGRAD),
    (r"fprop|convolve_sgemm|implicit_convolve|conv2d_grouped_direct|winograd", FPROP),
    # Inductor's names list the operations that were fused: a template is its convolution, norm outweighs pointwise
    (r"^triton_tem\w*convolution_backward", CONV_BACKWARD),
    (r"^triton_tem\w*convolution", FPROP),
    (r"^triton_tem\w*mm", MATMUL),
    (r"max_pool|avg_pool|adaptive_average_pool|^_pool(_backward)?_kernel", POOL),
    (r"^triton_\w*(batch_norm|var_mean)", NORM),
    # this package's: Triton's by their functions, CUDA's by their namespace
    (r"^_(stats|finish_stats|affine|act|reduce|finish_sums|coefficients|backward|masked_grad|add_masked)_kernel", NORM),
    (r"^_(centre|gram_stats|finish_weights|finish_mixing)_kernel", NORM),
    (r"^_conv_stats_kernel", FPROP),
    (r"^_conv_add_grad_kernel", DGRAD),
    (r"^_gram_kernel", WGRAD),
    (r"fused_resnet", NORM),
    (r"batch_?norm|\bbn_(fw|bw)|welford", NORM),
    (r"[Ss]oft_?[Mm]ax|nll_loss|cross_entropy|^triton_\w*nll", LOSS),
    # the optimizer runs over lists of tensors, and so do casts of all weights
    (r"multi_tensor_apply_kernel.*Copy", CAST),
    (r"multi_tensor_apply_kernel|FusedSgd|Sgd\w*Functor", OPTIMIZER),
    (r"nchwToNhwc|nhwcToNchw|nchw2nhwc|nhwc2nchw|convertTensor|scalePackedTensor", CAST),
    (r"^Mem(cpy|set)|direct_copy_kernel|copy_kernel_cuda|_copy_kernel|CatArrayBatchedCopy|FillFunctor", CAST),
    (r"^triton_poi_fused_(_?to_copy|convert_element_type|copy|clone)[\d_]*$", CAST),
    (r"gemm|gemv|^nvjet|cutlass.*tensorop|splitKreduce|cublas", MATMUL),
    (r"^triton_", POINTWISE),
    (r"elementwise_kernel|reduce_kernel", POINTWISE),
)

# Operations of the dispatcher, on the CPU, and what stands between them.
CPU_PATTERNS = (
    (r"aten::\w*convolution_backward", CONV_BACKWARD),
    (r"aten::(conv|_conv|mkldnn_conv|thnn_conv|slow_conv)", FPROP),
    (r"pool|aten::mean$", POOL),
    (r"batch_norm|^fused_resnet::", NORM),
    # Inductor's loops, which are norm, ReLU and add in one; its convolutions are operations of their own
    (r"CompiledFxGraph|^cpp_fused", NORM),
    (r"foreach_copy", CAST),
    (r"sgd_|foreach", OPTIMIZER),
    (r"aten::\w*(softmax|nll_loss|cross_entropy)", LOSS),
    (r"aten::(mm|addmm|linear|matmul|bmm)$", MATMUL),
    (r"aten::(copy_|_to_copy|to|clone|contiguous|zeros?|zero_|ones\w*|fill_|new_\w+|empty\w*|resize_)$", CAST),
    (r"aten::(detach|view|reshape|expand|as_strided|transpose|t|flatten|unsqueeze|alias|slice|select)_?$", HOST),
    (r"^aten::", POINTWISE),
    # autograd's nodes, Dynamo's guards, the optimizer's Python
    (r"autograd::|Backward\d*$|Function$|Dynamo|Torch-Compiled|Pregraph|AOTDispatcher|^Optimizer\.|^detach$", HOST),
)


def classify(name: str, device_type: str) -> str:
    """Return which of `CLASSES` a kernel (on a GPU) or an operation (on the CPU) belongs to."""
    patterns = CUDA_PATTERNS if device_type == "cuda" else CPU_PATTERNS
    return next((kind for pattern, kind in patterns if re.search(pattern, name)), OTHER)
