#pragma once
// The functions that g++ -fsanitize=undefined calls on undefined behaviour, replacing libubsan: each ends the launch.
// Every record passed to them starts with the source location.

namespace exl_host {
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
inline void undefined(const void* record, const char* what, void* site) {
  const SourceLocation* at = static_cast<const SourceLocation*>(record);
  fail(site, nullptr, "undefined behaviour: %s at %s:%u:%u", what, at->file ? at->file : "?", at->line, at->column);
}
}  // namespace exl_host

extern "C" {
#define EXL_UB1(name, what) \
  void __ubsan_handle_##name(void* d) { undefined(d, what, EXL_SITE); }
#define EXL_UB2(name, what) \
  void __ubsan_handle_##name(void* d, void*) { undefined(d, what, EXL_SITE); }
#define EXL_UB3(name, what) \
  void __ubsan_handle_##name(void* d, void*, void*) { undefined(d, what, EXL_SITE); }
#define EXL_UB_BOTH(n, name, what) EXL_UB##n(name, what) EXL_UB##n(name##_abort, what)
EXL_UB_BOTH(2, type_mismatch_v1, "access through a null or misaligned pointer")
EXL_UB_BOTH(3, add_overflow, "signed addition overflows")
EXL_UB_BOTH(3, sub_overflow, "signed subtraction overflows")
EXL_UB_BOTH(3, mul_overflow, "signed multiplication overflows")
EXL_UB_BOTH(2, negate_overflow, "negation overflows")
EXL_UB_BOTH(3, divrem_overflow, "division by zero or overflow")
EXL_UB_BOTH(3, shift_out_of_bounds, "shift by a negative number, by too many bits, or of a negative value")
EXL_UB_BOTH(2, out_of_bounds, "array index out of bounds")
EXL_UB_BOTH(2, load_invalid_value, "value outside of its type's range")
EXL_UB_BOTH(2, vla_bound_not_positive, "array of no positive size")
EXL_UB_BOTH(2, float_cast_overflow, "floating-point value outside of the target type's range")
EXL_UB_BOTH(3, pointer_overflow, "pointer arithmetic overflows")
EXL_UB_BOTH(1, nonnull_arg, "null pointer to a function that forbids it")
EXL_UB_BOTH(1, invalid_builtin, "builtin called with zero")
EXL_UB1(builtin_unreachable, "code declared unreachable is reached")
EXL_UB1(missing_return, "function ends without its return value")
#undef EXL_UB1
#undef EXL_UB2
#undef EXL_UB3
#undef EXL_UB_BOTH
}
