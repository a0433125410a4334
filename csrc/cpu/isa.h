// The instruction sets that the CPU kernels are compiled for, and the one that this machine gets.
#pragma once

namespace fused_resnet::cpu {

enum class Isa { kBaseline, kX86_64_v3, kX86_64_v4, kX86_64_v4_bf16 };

inline constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kX86_64_v3, Isa::kX86_64_v4, Isa::kX86_64_v4_bf16};  // ascending

inline constexpr const char* kIsaNames[] = {"baseline", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"};

// The best set that the processor has and that was built.  The environment variable FUSED_RESNET_ISA, read once, names
// a lower one; a name that is unknown or not available here is ignored.
Isa isa();

// Whether the kernels were compiled for this set.
bool isa_built(Isa isa);

}  // namespace fused_resnet::cpu
