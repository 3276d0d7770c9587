// Definitions that GCC 12 takes from a newer glibc or libstdc++ than manylinux_2_28 has, which is that of GCC 8. With
// these, hidden in the extension, a build on any Linux needs neither: `make wheel` checks it.
#include <new>
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__) && !defined(__clang__)
#define VATTN_HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32: whether the process has one thread, so that shared_ptr may count without atomics. It may not.
extern "C" VATTN_HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;

// GCC 9 (default constructors), GCC 11 (C++20's str): of the library's templates, instances of our own.
namespace std {
template VATTN_HIDDEN ostringstream::basic_ostringstream();
template VATTN_HIDDEN stringstream::basic_stringstream();
template VATTN_HIDDEN string stringbuf::str() const&;
template VATTN_HIDDEN string stringbuf::str() &&;
}  // namespace std

// GCC 11: std::__throw_bad_array_new_length.
extern "C" [[noreturn]] VATTN_HIDDEN void throw_bad_array_new_length() asm("_ZSt28__throw_bad_array_new_lengthv");
void throw_bad_array_new_length() { throw std::bad_array_new_length(); }
#endif
