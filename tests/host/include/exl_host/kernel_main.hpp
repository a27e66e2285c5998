#pragma once
// Appended to every kernel's source: describes the entry's signature to Python, and calls it.

struct half;
struct bf16;

namespace exl_host {

template <class T> struct Element {
  static constexpr char kind = 's';
  static constexpr u8 num_bytes = sizeof(T);
};
template <> struct Element<void> {
  static constexpr char kind = 'v';
  static constexpr u8 num_bytes = 0;
};
template <> struct Element<half> {
  static constexpr char kind = 'h';
  static constexpr u8 num_bytes = 2;
};
template <> struct Element<bf16> {
  static constexpr char kind = 'b';
  static constexpr u8 num_bytes = 2;
};
#define EXL_ELEMENT(T, k)                      \
  template <> struct Element<T> {              \
    static constexpr char kind = k;            \
    static constexpr u8 num_bytes = sizeof(T); \
  };
EXL_ELEMENT(char, 'i')
EXL_ELEMENT(i8, 'i') EXL_ELEMENT(short, 'i') EXL_ELEMENT(int, 'i') EXL_ELEMENT(long, 'i') EXL_ELEMENT(i64, 'i')
    EXL_ELEMENT(bool, 'u') EXL_ELEMENT(u8, 'u') EXL_ELEMENT(u16, 'u') EXL_ELEMENT(u32, 'u')
        EXL_ELEMENT(unsigned long, 'u') EXL_ELEMENT(u64, 'u') EXL_ELEMENT(float, 'f') EXL_ELEMENT(double, 'f')
#undef EXL_ELEMENT

            template <class T>
            struct Strip {
  using type = T;
  static constexpr bool is_const = false;
};
template <class T> struct Strip<const T> {
  using type = T;
  static constexpr bool is_const = true;
};
template <class T> struct Describe {
  static ExlParam get() { return {Element<typename Strip<T>::type>::kind, 0, sizeof(T), 0, 0}; }
};
template <class T> struct Describe<T*> {
  using E = typename Strip<T>::type;
  static ExlParam get() { return {'p', Element<E>::kind, sizeof(T*), Element<E>::num_bytes, Strip<T>::is_const}; }
};
template <class T> struct Describe<T* const> : Describe<T*> {};
template <class T> struct Describe<T* __restrict> : Describe<T*> {};

template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};

template <class T>
__attribute__((no_sanitize("thread", "address", "undefined"), always_inline)) inline T load(const uint64_t* slot) {
  T v;
  __builtin_memcpy(&v, slot, sizeof v);
  return v;
}
template <class... A> int params(void (*)(A...), ExlParam* out) {
  static_assert(sizeof...(A) <= kExlMaxParams, "too many parameters");
  const ExlParam all[] = {Describe<A>::get()..., ExlParam{}};
  for (unsigned i = 0; i < sizeof...(A); ++i) out[i] = all[i];
  return sizeof...(A);
}
template <class... A, int... I>
__attribute__((no_sanitize("thread", "address", "undefined"), always_inline)) inline void call(void (*f)(A...),
                                                                                               const uint64_t* args,
                                                                                               Indices<I...>) {
  f(load<A>(args + I)...);
}
template <class... A>
__attribute__((no_sanitize("thread", "address", "undefined"), always_inline)) inline void call(void (*f)(A...),
                                                                                               const uint64_t* args) {
  call(f, args, typename MakeIndices<sizeof...(A)>::type());
}

}  // namespace exl_host

#define EXL_PASTE_(a, b) a##b
#define EXL_PASTE(a, b) EXL_PASTE_(a, b)
extern "C" __attribute__((no_sanitize("thread", "address", "undefined"))) int exl_host_params(ExlParam* out) {
  return exl_host::params(EXL_HOST_ENTRY, out);
}
extern "C" __attribute__((no_sanitize("thread", "address", "undefined"))) uint32_t exl_host_max_threads() {
  return EXL_PASTE(EXL_HOST_ENTRY, _max_threads);
}
extern "C" __attribute__((no_sanitize("thread", "address", "undefined"))) void exl_host_call(const uint64_t* args) {
  exl_host::call(EXL_HOST_ENTRY, args);
}
