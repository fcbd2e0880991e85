// What the operations work on: the program, a launch, a CTA and its warps.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

constexpr int LANES = 32;
constexpr uint32_t ALL = 0xffffffffu;      // a mask of all lanes
constexpr uint32_t CONSTANT = 0x80000000u; // marks an operand in the pool of constants
constexpr int SLOT = LANES * 4;            // bytes of a 32-bit register of a warp; one of 64 bits takes two slots

// Laid out as the ctypes structures of the same name in library.py.
struct Instruction {
    int32_t operation; // index into the table of operations
    int32_t guard;     // register of the predicate under which a lane takes part, or -1
    int32_t negated;   // whether the guard must be false
    int32_t operands;  // where they begin in Program::operands
    int32_t registers; // how many there are
    int32_t results;   // how many of them, the first ones, are written
    int32_t count;     // memory: registers of a vector
    int32_t bytes;     // memory: bytes of one element
    int32_t offset;    // memory: added to the address in bytes; branches: the target
    int32_t variant;   // what else an operation must know
};

struct Counters { // per instruction
    uint64_t issued;     // warp instructions
    uint64_t lanes;      // lanes that took part
    uint64_t sectors;    // 32-byte sectors of global memory, distinct within a request
    uint64_t wavefronts; // passes over shared memory
    uint64_t ideal;      // what they would be without bank conflicts
};

struct Allocation { // global memory that a launch may access
    uint64_t begin, end;
    int32_t writable; // may be stored to
    int32_t granule;  // log2 of the bytes of a number in it, for each of which there is a trace
    int32_t traces;   // where its traces begin; only writable memory has them
};

struct Program {
    const Instruction* code;
    const uint32_t* operands;
    const uint8_t* constants;
    int32_t length, slots, warps, shared_bytes;
    int32_t shared_granule; // log2 of the bytes of the narrowest access to shared memory
    int32_t asynchronous;   // whether there is a wgmma
};

struct Launch {
    const uint8_t* parameters;
    Allocation* allocations; // by address, disjoint
    Counters* counters;      // one per instruction
    uint64_t* totals;        // sectors distinct within a CTA, summed over CTAs; sectors distinct within the launch
    int32_t n_allocations, n_traces;
    int32_t grid[3];
    int32_t reverse;    // CTAs and warps take their turns in reverse order
    int32_t truncating; // the model of tensor cores: 0, or the bytes of a row that are added at once, see matrix.inc
    int32_t counting;
};

struct Report { // what went wrong, for Python
    char kind[64];
    char detail[256];
    int32_t instruction, cta, warp, lane;
};

struct Fault {
    std::string kind, detail;
    int lane;
};

[[noreturn]] inline void fail(const std::string& kind, const std::string& detail, int lane = -1) {
    throw Fault{kind, detail, lane};
}

// Who last wrote and read a few bytes of memory. An agent is a warp; in a program of one warp it is a lane, because there
// lanes are what bar.warp.sync keeps in order. An epoch lies between two barriers of a CTA. CTAs are numbered from 1.
struct Trace {
    uint32_t write_cta, write_epoch, write_time;
    uint32_t read_cta, read_epoch, readers;
    uint16_t writer, several_ctas_read;
    uint32_t unused;
};

struct Warp;

struct Cta {
    const Program& program;
    const Launch& launch;
    std::vector<Trace>& traces;       // of global memory
    std::vector<uint32_t>& recent;    // the allocation that each instruction last accessed
    std::vector<uint8_t>& shared;
    std::vector<Trace>& shared_traces;
    std::vector<uint16_t>& readers;   // per 16 bytes of shared memory how many pending wgmma read them
    std::vector<Warp>& warps;
    std::unordered_set<uint64_t>* sectors; // distinct ones that this CTA accessed, if they are counted
    const Warp* running = nullptr;
    uint32_t id = 1;
    int32_t index[3] = {};
    uint32_t epoch = 1;
    uint32_t time = 1; // advances with every proxy fence
};

struct Group { // lanes of a warp that are at the same instruction
    int32_t at;
    uint32_t lanes;
};

struct Pending { // a wgmma that has not been waited for
    std::vector<uint32_t> results, inputs; // registers
    std::vector<uint32_t> chunks;          // 16 bytes of shared memory each that it reads
    uint32_t group = 0;                    // the group that it was committed to
};

struct Warp {
    Cta* cta;
    int32_t id;
    std::vector<uint8_t> registers;
    int32_t next = 0;                 // instruction
    uint32_t active = ALL;            // lanes that are at it
    uint32_t alive = ALL;             // lanes that have not ended
    std::vector<Group> others;        // lanes that wait elsewhere
    int32_t meeting = INT32_MAX;      // the first place where others wait
    bool at_barrier = false;
    // For wgmma:
    std::vector<Pending> pending;
    uint32_t groups = 0;                       // committed so far
    uint32_t fence_time = 0, fence_epoch = 0;  // of the last fence.proxy.async
    uint32_t clock = 0, fenced = 0;            // instructions so far, and by the last wgmma.fence
    std::vector<uint32_t> written;             // when each register was last written, but by a wgmma

    template <class T> const T* source(uint32_t operand) const {
        const uint8_t* base = operand & CONSTANT ? cta->program.constants : registers.data();
        return reinterpret_cast<const T*>(base + size_t(operand & ~CONSTANT) * SLOT);
    }
    template <class T> T* target(uint32_t operand) {
        return reinterpret_cast<T*>(registers.data() + size_t(operand) * SLOT);
    }
    // A predicate is a mask in the first lane of its register.
    uint32_t mask_of(uint32_t operand) const { return *source<uint32_t>(operand); }
    uint32_t& predicate(uint32_t operand) { return *target<uint32_t>(operand); }
    uint32_t agent(int lane) const { return cta->program.warps == 1 ? lane : id; }
};

// An operation on the lanes of a mask, which is never empty. `o` are its operands.
using Handler = void (*)(Warp& w, const Instruction& i, const uint32_t* o, uint32_t mask);

struct Operation {
    const char* name;
    Handler handler;
    bool whole_warp; // must be executed by all lanes at once: the .aligned ones, shuffles, barriers
};
