// Errors of the C interface, and the choice of instructions.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "kernels.h"

namespace potstill {

namespace {

thread_local char message[256] = "";

struct InstructionSet {
    const char *name;
    KernelsOf kernels;
};

const InstructionSet instruction_sets[] = {
    {"baseline", baseline::kernels},
#ifdef POTSTILL_X86
    {"avx2", avx2::kernels},
    {"avx512", avx512::kernels},
#endif
};

bool runs_here(const InstructionSet &set) {
#ifdef POTSTILL_X86
    __builtin_cpu_init();
    if (!std::strcmp(set.name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!std::strcmp(set.name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#endif
    (void)set;
    return true;
}

const InstructionSet *find(const char *name) {
    for (const InstructionSet &set : instruction_sets)
        if (!std::strcmp(set.name, name)) return &set;
    return nullptr;
}

std::mutex choice_lock;
const InstructionSet *choice = nullptr;

// What `name` stands for, or NULL with the reason in `message`.
const InstructionSet *usable(const char *name, const char *where) {
    const InstructionSet *set = find(name);
    if (!set) {
        char known[64] = "";
        for (const InstructionSet &s : instruction_sets) {
            if (*known) std::strcat(known, ", ");
            std::strcat(known, s.name);
        }
        fail(POTSTILL_NO_INSTRUCTIONS, "%s is '%s', but known are %s", where, name, known);
    } else if (!runs_here(*set)) {
        fail(POTSTILL_NO_INSTRUCTIONS, "%s is '%s', which this processor cannot run", where, name);
        set = nullptr;
    }
    return set;
}

const InstructionSet *current() {
    std::lock_guard<std::mutex> guard(choice_lock);
    if (choice) return choice;
    const char *name = std::getenv("POTSTILL_SIMD");
    if (name && *name) return choice = usable(name, "POTSTILL_SIMD");
    for (const InstructionSet &set : instruction_sets)
        if (runs_here(set)) choice = &set;
    return choice;
}

}  // namespace

int fail(int code, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return code;
}

KernelsOf current_kernels() {
    const InstructionSet *set = current();
    return set ? set->kernels : nullptr;
}

}  // namespace potstill

using namespace potstill;

extern "C" {

const char *const *potstill_compiled_instruction_sets(void) {
    static const char *names[8] = {};
    static const bool filled = [] {
        int k = 0;
        for (const InstructionSet &set : instruction_sets) names[k++] = set.name;
        return true;
    }();
    (void)filled;
    return names;
}

int potstill_runnable(const char *instruction_set) {
    const InstructionSet *set = find(instruction_set);
    return set && runs_here(*set);
}

int potstill_select(const char *instruction_set) {
    const InstructionSet *set = nullptr;
    if (instruction_set) {
        set = usable(instruction_set, "the instruction set");
        if (!set) return POTSTILL_NO_INSTRUCTIONS;
    }
    std::lock_guard<std::mutex> guard(choice_lock);
    choice = set;
    return 0;
}

const char *potstill_instruction_set(void) {
    const InstructionSet *set = current();
    return set ? set->name : nullptr;
}

const char *potstill_error(void) { return message; }

}  // extern "C"
