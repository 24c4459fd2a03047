// A program that prints what dispatch.cpp finds on a machine that has the features given as
// arguments: the instruction sets, and beside each the one of its int8 kernels. What returns a
// table is compiled for its instruction set, so calling it on a machine without that is an illegal
// instruction; here the call ends the program with a sentence.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../../../csrc/int8.h"

static char** features;

bool machine_has(const char* feature) {
  for (char** one = features; *one; ++one)
    if (std::strcmp(*one, feature) == 0) return true;
  return false;
}

namespace slab {
namespace {

template <class Table>
const Table* table(const char* name, std::initializer_list<const char*> needed) {
  for (const char* feature : needed)
    if (!machine_has(feature)) {
      std::printf("the table of %s was asked for without %s\n", name, feature);
      std::exit(1);
    }
  Table* const made = new Table{};
  made->name = name;
  return made;
}

}  // namespace

#define AVX2 "avx2", "fma"
#define AVX512 AVX2, "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"

const CpuKernels* cpu_kernels_scalar() { return table<CpuKernels>("scalar", {}); }
const CpuKernels* cpu_kernels_avx2() { return table<CpuKernels>("avx2", {AVX2, "f16c"}); }
const CpuKernels* cpu_kernels_avx512() { return table<CpuKernels>("avx512", {AVX512}); }
const CpuKernels* cpu_kernels_avx512_bf16() {
  return table<CpuKernels>("avx512_bf16", {AVX512, "avx512bf16"});
}
const CpuKernels* cpu_kernels_avx512_amx() {  // as if built without it
  table<CpuKernels>("avx512_amx", {AVX512, "avx512bf16"});
  return nullptr;
}
const CpuKernels* cpu_kernels_avx512_amx_emulated() {
  return table<CpuKernels>("avx512_amx_emulated", {AVX512, "avx512bf16"});
}
const Int8Kernels* int8_kernels_scalar() { return table<Int8Kernels>("scalar", {}); }
const Int8Kernels* int8_kernels_avx2() { return table<Int8Kernels>("avx2", {AVX2}); }
const Int8Kernels* int8_kernels_vnni() {
  return table<Int8Kernels>(
      "avx512_vnni", {AVX512, "avx512vnni", "avx512vbmi", "avx512bitalg", "avx512vpopcntdq"});
}

}  // namespace slab

int main(int, char** arguments) {
  features = arguments + 1;
  for (int i = 0; const slab::CpuKernels* found = slab::cpu_kernels(i); ++i)
    std::printf("%s:%s ", found->name, slab::int8_kernels(*found).name);
  if (const slab::CpuKernels* emulated = slab::cpu_emulated_kernels())
    std::printf("%s", emulated->name);
}
