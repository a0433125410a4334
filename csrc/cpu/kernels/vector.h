// Vectors of one instruction set, in the compilers' own vector extensions.
//
// This header and the kernels are compiled once for each instruction set, in a namespace of its own: an inline function
// that the linker could merge across them would bring AVX-512 into the baseline.  For the same reason no standard
// template is used here.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "ops/engine.h"

#define FUSED_RESNET_INLINE inline __attribute__((always_inline))

namespace fused_resnet::cpu::FUSED_RESNET_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};

template <typename E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <typename E, int N>
using Vector = typename VectorOf<E, N>::type;

// What is computed in: float for float and bfloat16, double for double.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

template <typename T>
struct IsBFloat16 {
  static constexpr bool value = false;
};
template <>
struct IsBFloat16<BFloat16> {
  static constexpr bool value = true;
};

// Integers as wide as an accumulator: a comparison's result, a position.
template <typename A>
struct IntegerOf {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};
template <typename A>
using Integer = typename IntegerOf<A>::type;

template <typename T>
inline constexpr int kLanes = kVectorBytes / sizeof(Accumulator<T>);

// The number of lanes as an argument, so that a loop's body is one generic lambda for whole vectors and for the tail.
template <int N>
struct Lanes {
  static constexpr int value = N;
};

// body(Lanes, j) over the columns [0, n), in vectors of T's lanes and then one by one.
template <typename T, typename Body>
FUSED_RESNET_INLINE void for_each_vector(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) body(Lanes<kLanes<T>>{}, j);
  for (int64_t rest = n % kLanes<T>; rest > 0; --rest, ++j) body(Lanes<1>{}, j);
}

template <typename V, typename A>
FUSED_RESNET_INLINE V splat(A value) {
  return value - V{};  // not value + V{}: -0 + 0 is 0
}

// What act(v) is at least, where that is all of it: a ReLU, or nothing.
FUSED_RESNET_INLINE bool is_floor(const Act& act) { return act.kind == ActKind::kNone || act.kind == ActKind::kRelu; }
template <typename A>
A floor_of(const Act& act) {
  return act.kind == ActKind::kRelu ? A{} : -static_cast<A>(__builtin_inf());
}

// v or a floor; NaN stays.
template <typename V, typename A>
FUSED_RESNET_INLINE V at_least(A floor, V v) {
  return v < floor ? splat<V>(floor) : v;
}

// ---- conversions: a compiler may take four instructions for one that crosses 256 bits

// N bfloat16 as floats: a bfloat16 is the upper half of one.
template <int N>
FUSED_RESNET_INLINE Vector<float, N> from_bfloat16(Vector<uint16_t, N> v) {
  Vector<uint32_t, N> wide;
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    wide = (Vector<uint32_t, N>)_mm512_cvtepu16_epi32((__m256i)v);
    return (Vector<float, N>)(wide << 16);
  }
#endif
  wide = __builtin_convertvector(v, Vector<uint32_t, N>);
  return (Vector<float, N>)(wide << 16);
}

// To nearest, ties to even; a NaN stays one (its payload must not be rounded up into an infinity).
template <int N>
FUSED_RESNET_INLINE Vector<uint16_t, N> to_bfloat16(Vector<float, N> v) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) return (Vector<uint16_t, N>)_mm512_cvtneps_pbh((__m512)v);
#endif
  const auto bits = (Vector<uint32_t, N>)v;
  const auto rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const auto quiet = splat<Vector<uint32_t, N>>(0x7fc00000u);
  const Vector<uint32_t, N> upper = (v == v ? rounded : quiet) >> 16;
#if defined(__AVX512F__)
  if constexpr (N == 16) return (Vector<uint16_t, N>)_mm512_cvtepi32_epi16((__m512i)upper);
#endif
  return __builtin_convertvector(upper, Vector<uint16_t, N>);
}

// N bytes as integers, and back.
template <typename I, int N>
FUSED_RESNET_INLINE Vector<I, N> from_bytes(Vector<uint8_t, N> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(I) == 4 && N == 16) return (Vector<I, N>)_mm512_cvtepu8_epi32((__m128i)v);
#endif
  return __builtin_convertvector(v, Vector<I, N>);
}
template <typename I, int N>
FUSED_RESNET_INLINE Vector<uint8_t, N> to_bytes(Vector<I, N> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(I) == 4 && N == 16) return (Vector<uint8_t, N>)_mm512_cvtepi32_epi8((__m512i)v);
#endif
  return __builtin_convertvector(v, Vector<uint8_t, N>);
}

// N elements, widened.
template <int N, typename T>
FUSED_RESNET_INLINE auto load(Lanes<N>, const T* p) {
  if constexpr (IsBFloat16<T>::value) {
    Vector<uint16_t, N> half;
    __builtin_memcpy(&half, p, sizeof(half));
    return from_bfloat16<N>(half);
  } else {
    Vector<T, N> v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <int N, typename A>
FUSED_RESNET_INLINE void store(Lanes<N>, A* p, Vector<A, N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// What v is after it has been stored in T.
template <typename T, int N>
FUSED_RESNET_INLINE Vector<Accumulator<T>, N> rounded_to(Lanes<N>, Vector<Accumulator<T>, N> v) {
  if constexpr (IsBFloat16<T>::value) {
    return from_bfloat16<N>(to_bfloat16<N>(v));
  } else {
    return v;
  }
}

template <typename P, typename V>
FUSED_RESNET_INLINE void store_past_caches(P* p, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
    return;
  }
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
    return;
  }
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
    return;
  }
#endif
#endif
  __builtin_memcpy(p, &v, sizeof(v));
}

// N elements, rounded to T.  `stream`: past the caches, which asks for aligned addresses wherever N is more than one.
template <int N, typename T>
FUSED_RESNET_INLINE void store(Lanes<N>, T* p, Vector<Accumulator<T>, N> v, bool stream) {
  if constexpr (IsBFloat16<T>::value) {
    const Vector<uint16_t, N> half = to_bfloat16<N>(v);
    stream ? store_past_caches(p, half) : (void)__builtin_memcpy(p, &half, sizeof(half));
  } else {
    stream ? store_past_caches(p, v) : (void)__builtin_memcpy(p, &v, sizeof(v));
  }
}

// Orders stores past the caches before whatever tells another thread that they are there.
FUSED_RESNET_INLINE void fence(bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

// Asks for a cache line, into the L2 cache.
FUSED_RESNET_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// sums[0..N) += v, in double.
template <int N>
FUSED_RESNET_INLINE void add_to(Lanes<N>, double* sums, Vector<double, N> v) {
  store(Lanes<N>{}, sums, load(Lanes<N>{}, sums) + v);
}
FUSED_RESNET_INLINE void add_to(Lanes<1>, double* sums, Vector<float, 1> v) { *sums += v[0]; }
template <int N>
FUSED_RESNET_INLINE void add_to(Lanes<N>, double* sums, Vector<float, N> v) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512 all = (__m512)v;
    add_to(Lanes<8>{}, sums, (Vector<double, 8>)_mm512_cvtps_pd(_mm512_castps512_ps256(all)));
    add_to(Lanes<8>{}, sums + 8, (Vector<double, 8>)_mm512_cvtps_pd(_mm512_extractf32x8_ps(all, 1)));
    return;
  }
#endif
  struct {
    Vector<float, N / 2> low, high;
  } halves;
  __builtin_memcpy(&halves, &v, sizeof(v));
  add_to(Lanes<N / 2>{}, sums, __builtin_convertvector(halves.low, Vector<double, N / 2>));
  add_to(Lanes<N / 2>{}, sums + N / 2, __builtin_convertvector(halves.high, Vector<double, N / 2>));
}

// sums[0..N) += p[0..N), in double: float is widened straight from memory, without taking a vector apart.
template <int N, typename T>
FUSED_RESNET_INLINE void add_from(Lanes<N> lanes, double* sums, const T* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16 && sizeof(T) == sizeof(float)) {
    add_to(Lanes<8>{}, sums, (Vector<double, 8>)_mm512_cvtps_pd(_mm256_loadu_ps((const float*)p)));
    add_to(Lanes<8>{}, sums + 8, (Vector<double, 8>)_mm512_cvtps_pd(_mm256_loadu_ps((const float*)p + 8)));
    return;
  }
#endif
  add_to(lanes, sums, load(lanes, p));
}

// A per-channel vector along a row: one value a column, or (kBroadcast) one for the whole row.
template <typename A, bool kBroadcast>
class Coefficient {
 public:
  Coefficient(const void* values, int64_t offset)
      : values_(static_cast<const A*>(values) + (values != nullptr ? offset : 0)),
        value_(kBroadcast && values != nullptr ? *values_ : A{}) {}

  template <int N>
  FUSED_RESNET_INLINE Vector<A, N> operator()(Lanes<N> lanes, int64_t j) const {
    if constexpr (kBroadcast) {
      return splat<Vector<A, N>>(value_);
    } else {
      return load(lanes, values_ + j);
    }
  }

 private:
  const A* values_;
  A value_;
};

// visitor(T{}) with the C++ type of an activation's elements.
template <typename Visitor>
FUSED_RESNET_INLINE void visit_dtype(DType dtype, const Visitor& visitor) {
  switch (dtype) {
    case DType::kFloat32:
      return visitor(float{});
    case DType::kBFloat16:
      return visitor(BFloat16{});
    case DType::kFloat64:
      return visitor(double{});
    case DType::kFloat16:
      return;  // not among the dtypes that the CPU engine takes
  }
}

// visitor(Constant<value>{}): a run-time choice made a compile-time one.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};
template <typename Visitor>
FUSED_RESNET_INLINE void visit_bool(bool value, const Visitor& visitor) {
  return value ? visitor(Constant<true>{}) : visitor(Constant<false>{});
}

}  // namespace fused_resnet::cpu::FUSED_RESNET_ISA
