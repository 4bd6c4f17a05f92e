// The tile instructions of AMX bf16, executed in software on a processor that has none of them.
//
// Such a processor raises SIGILL at each. The handler here decodes the instruction and does what Intel's manual says of
// it (SDM: volume 1, "Programming with Intel AMX"; volume 2, the instructions' pages and "Intel AMX instruction exception
// classes"), so that machine code which was compiled for AMX runs as it is. What a processor would refuse ends the
// process by SIGILL, the reason on stderr.
//
// While software_amx_step(1) is on, the calling thread runs instruction by instruction (the trap flag), and CPUID, XGETBV
// and the system call that asks for the tiles answer as on a processor and a system that have them.
#include <fcntl.h>
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>

#include "cpu/kernels.h"

namespace {

constexpr int num_tiles = 8, max_rows = 16, max_colsb = 64;   // palette 1
constexpr int max_threads = 512;

// What LDTILECFG reads and STTILECFG writes.
struct Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t colsb[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(Configuration) == 64, "the manual's table");

// The tiles of a thread.
struct State {
    bool configured;
    Configuration configuration;
    alignas(64) uint32_t tiles[num_tiles][max_rows][max_colsb / 4];
};

// splits: loads and stores whose rows lie in two cache lines each.
enum Count { configures, releases, zeros, loads, stores, dots, permissions, splits, num_counts };

State states[max_threads];
std::atomic<int> num_states{0};
std::atomic<uint64_t> counts[num_counts];
std::atomic<bool> permitted{false};
// stderr as the process began with it, before pytest captures it.
const int report = fcntl(2, F_DUPFD_CLOEXEC, 3);

// Initial-exec: such a variable can be read in a signal handler, nothing is allocated at its first use.
[[gnu::tls_model("initial-exec")]] thread_local State* own_state = nullptr;
[[gnu::tls_model("initial-exec")]] thread_local sigjmp_buf* on_refusal = nullptr;
[[gnu::tls_model("initial-exec")]] thread_local const char* refusal = nullptr;

[[noreturn]] void refuse(const char* reason) {
    refusal = reason;
    if (on_refusal != nullptr) siglongjmp(*on_refusal, 1);
    char text[256] = "software AMX: a processor would refuse this: ";
    strncat(text, reason, sizeof(text) - strlen(text) - 2);
    strcat(text, "\n");
    if (write(report, text, strlen(text)) < 0) _exit(3);
    struct sigaction action = {};
    action.sa_handler = SIG_DFL;
    sigaction(SIGILL, &action, nullptr);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGILL);
    sigprocmask(SIG_UNBLOCK, &set, nullptr);
    raise(SIGILL);
    _exit(3);
}

State& state() {
    if (own_state == nullptr) {
        const int index = num_states++;
        if (index >= max_threads) refuse("more threads than this test has tiles for");
        own_state = &states[index];
    }
    return *own_state;
}

bool any(const void* bytes, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        if (static_cast<const uint8_t*>(bytes)[i] != 0) return true;
    }
    return false;
}

void release(State& s) { memset(static_cast<void*>(&s), 0, sizeof(s)); }

void configure(State& s, const void* from) {
    Configuration c;
    memcpy(&c, from, sizeof(c));
    if (c.palette > 1) refuse("LDTILECFG: a palette other than 0 and 1");
    if (c.palette == 0) return release(s);
    if (any(c.reserved, sizeof(c.reserved))) refuse("LDTILECFG: reserved bytes 2-15 are not zero");
    if (any(c.colsb + num_tiles, 2 * (16 - num_tiles))) refuse("LDTILECFG: bytes per row of a tile beyond tmm7");
    if (any(c.rows + num_tiles, 16 - num_tiles)) refuse("LDTILECFG: rows of a tile beyond tmm7");
    for (int i = 0; i < num_tiles; ++i) {
        if (c.colsb[i] > max_colsb) refuse("LDTILECFG: more than 64 bytes per row");
        if (c.rows[i] > max_rows) refuse("LDTILECFG: more than 16 rows");
        if ((c.rows[i] == 0) != (c.colsb[i] == 0)) refuse("LDTILECFG: a tile with rows of no bytes, or bytes in no row");
    }
    release(s);
    s.configuration = c;
    s.configured = true;
}

// Checks that a tile can be used.
void need(const State& s, int tile) {
    if (!permitted) refuse("a tile is used without the system's permission");
    if (!s.configured) refuse("a tile is used without LDTILECFG, or after TILERELEASE");
    if (tile >= num_tiles) refuse("a tile beyond tmm7");
    if (s.configuration.rows[tile] == 0) refuse("a tile is used that the configuration leaves out");
    if (s.configuration.colsb[tile] % 4 != 0) refuse("a tile whose rows are no multiple of 4 bytes");
}

void need_start(const State& s, int tile) {
    if (s.configuration.start_row >= s.configuration.rows[tile]) refuse("start_row is not a row of the tile");
}

void load(State& s, int tile, const char* from, int64_t stride) {
    need(s, tile);
    need_start(s, tile);
    Configuration& c = s.configuration;
    for (int row = 0; row < max_rows; ++row) {
        if (row < c.start_row) continue;
        memset(s.tiles[tile][row], 0, max_colsb);
        if (row < c.rows[tile]) memcpy(s.tiles[tile][row], from + row * stride, c.colsb[tile]);
    }
    c.start_row = 0;
}

void store(State& s, int tile, char* to, int64_t stride) {
    need(s, tile);
    need_start(s, tile);
    Configuration& c = s.configuration;
    for (int row = c.start_row; row < c.rows[tile]; ++row) memcpy(to + row * stride, s.tiles[tile][row], c.colsb[tile]);
    c.start_row = 0;
}

void zero(State& s, int tile) {
    need(s, tile);
    memset(s.tiles[tile], 0, sizeof(s.tiles[tile]));
    s.configuration.start_row = 0;
}

float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

// sum += a b as the manual's pseudo code has it: even and odd places apart by fused multiply-adds in the order of k, then
// together, then added to what stands there; rounded to nearest even, denormals zero on both sides whatever MXCSR says.
void dot(State& s, int sum, int a, int b) {
    for (int tile : {sum, a, b}) need(s, tile);
    const Configuration& c = s.configuration;
    if (sum == a || sum == b || a == b) refuse("TDPBF16PS: two of its tiles are the same");
    if (c.colsb[a] / 4 != c.rows[b]) refuse("TDPBF16PS: the units of A are not the rows of B");
    if (c.rows[sum] != c.rows[a]) refuse("TDPBF16PS: the rows of the sum are not those of A");
    if (c.colsb[sum] != c.colsb[b]) refuse("TDPBF16PS: the columns of the sum are not those of B");
    if (c.start_row != 0) refuse("TDPBF16PS: start_row is not 0");
    _mm_setcsr(0x9FC0);
    for (int m = 0; m < c.rows[sum]; ++m) {
        float even[max_colsb / 4] = {}, odd[max_colsb / 4] = {};
        for (int k = 0; k < c.rows[b]; ++k) {
            const uint32_t unit = s.tiles[a][m][k];
            const float low = as_float(unit << 16), high = as_float(unit & 0xFFFF0000u);
            for (int n = 0; n < max_colsb / 4; ++n) {
                const uint32_t other = s.tiles[b][k][n];
                even[n] = __builtin_fmaf(low, as_float(other << 16), even[n]);
                odd[n] = __builtin_fmaf(high, as_float(other & 0xFFFF0000u), odd[n]);
            }
        }
        for (int n = 0; n < c.colsb[sum] / 4; ++n) {
            const float value = as_float(s.tiles[sum][m][n]) + (even[n] + odd[n]);
            memcpy(&s.tiles[sum][m][n], &value, sizeof(value));
        }
        memset(&s.tiles[sum][m][c.colsb[sum] / 4], 0, max_colsb - c.colsb[sum]);
    }
    for (int m = c.rows[sum]; m < max_rows; ++m) memset(s.tiles[sum][m], 0, max_colsb);
}

int64_t read_register(const ucontext_t& context, int number) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                   REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context.uc_mcontext.gregs[places[number]];
}

// A VEX instruction of three prefix bytes in the map 0F38: its fields, and its memory operand.
struct Instruction {
    int opcode, pp, vvvv, mod, reg, rm;
    bool has_sib = false;
    int64_t address = 0;   // without the index
    int64_t index = 0;     // scaled
    int64_t length = 0;

    // Whether there is one at `at` that belongs to AMX.
    bool decode(const uint8_t* at, const ucontext_t& context) {
        if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || (at[3] != 0x49 && at[3] != 0x4B && at[3] != 0x5C)) return false;
        const int r = at[1] & 0x80 ? 0 : 8, x = at[1] & 0x40 ? 0 : 8, b = at[1] & 0x20 ? 0 : 8;
        if (at[2] & 0x80) refuse("VEX.W of a tile instruction is not 0");
        if (at[2] & 0x04) refuse("VEX.L of a tile instruction is not 0");
        vvvv = ~(at[2] >> 3) & 15;
        pp = at[2] & 3;
        opcode = at[3];
        mod = at[4] >> 6;
        reg = (at[4] >> 3 & 7) + r;
        rm = (at[4] & 7) + b;
        const uint8_t* next = at + 5;
        if (mod != 3) {
            has_sib = (at[4] & 7) == 4;
            bool no_base = mod == 0 && (at[4] & 7) == 5;   // relative to the next instruction
            const bool relative = no_base;
            int base = rm;
            if (has_sib) {
                const uint8_t sib = *next++;
                base = (sib & 7) + b;
                no_base = mod == 0 && (sib & 7) == 5;
                const int number = (sib >> 3 & 7) + x;
                if (number != 4) index = read_register(context, number) * (1 << (sib >> 6));
            }
            int32_t displacement = 0;
            if (mod == 1) {
                displacement = static_cast<int8_t>(*next++);
            } else if (mod == 2 || no_base) {
                memcpy(&displacement, next, 4);
                next += 4;
            }
            address = displacement + (relative ? reinterpret_cast<int64_t>(next) : no_base ? 0 : read_register(context, base));
        }
        length = next - at;
        return true;
    }
};

void execute(const Instruction& i) {
    enum Prefix { none, p66, pF3, pF2 };
    State& s = state();
    auto* memory = reinterpret_cast<char*>(i.address);
    const bool in_memory = i.mod != 3;
    if (i.opcode != 0x5C && i.vvvv != 0) refuse("VEX.vvvv names a register that the instruction does not have");
    if (i.opcode == 0x49 && i.pp == none && in_memory && i.reg == 0) {
        ++counts[configures];
        return configure(s, memory + i.index);
    }
    if (i.opcode == 0x49 && i.pp == p66 && in_memory && i.reg == 0) {
        Configuration none_yet;
        none_yet.palette = 0;
        memcpy(memory + i.index, s.configured ? &s.configuration : &none_yet, sizeof(Configuration));
        return;
    }
    if (i.opcode == 0x49 && i.pp == none && !in_memory && i.reg == 0 && i.rm == 0) {
        ++counts[releases];
        return release(s);
    }
    if (i.opcode == 0x49 && i.pp == pF2 && !in_memory && i.rm == 0) {
        ++counts[zeros];
        return zero(s, i.reg);
    }
    if (i.opcode == 0x4B && in_memory && i.pp != none) {
        if (!i.has_sib) refuse("a tile's load or store without an index byte");
        ++counts[i.pp == pF3 ? stores : loads];
        counts[splits] += ((i.address | i.index) & 63) != 0;
        return i.pp == pF3 ? store(s, i.reg, memory, i.index) : load(s, i.reg, memory, i.index);
    }
    if (i.opcode == 0x5C && i.pp == pF3 && !in_memory) {
        ++counts[dots];
        return dot(s, i.reg, i.rm, i.vvvv);
    }
    refuse("a tile instruction that AMX bf16 does not have");
}

struct sigaction before_ill;

void on_ill(int, siginfo_t*, void* context) {
    auto& c = *static_cast<ucontext_t*>(context);
    greg_t& rip = c.uc_mcontext.gregs[REG_RIP];
    Instruction instruction;
    if (!instruction.decode(reinterpret_cast<const uint8_t*>(rip), c)) {
        // Something else that this processor does not have: raised again, for whoever handled it before.
        sigaction(SIGILL, &before_ill, nullptr);
        return;
    }
    execute(instruction);
    rip += instruction.length;
}

// What tells that there are tiles. Several may follow each other: the trap flag stops behind an instruction, not before it.
void on_trap(int, siginfo_t*, void* context) {
    greg_t* r = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    for (;;) {
        const auto* at = reinterpret_cast<const uint8_t*>(r[REG_RIP]);
        if (at[0] == 0x0F && at[1] == 0xA2) {
            const auto leaf = static_cast<uint32_t>(r[REG_RAX]), part = static_cast<uint32_t>(r[REG_RCX]);
            uint32_t a, b, c, d;
            asm volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(part));
            if (leaf == 7 && part == 0) d |= 1u << 22 | 1u << 24;   // AMX-BF16, AMX-TILE
            r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
            r[REG_RIP] += 2;
        } else if (at[0] == 0x0F && at[1] == 0x01 && at[2] == 0xD0) {
            uint32_t low, high;
            asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(static_cast<uint32_t>(r[REG_RCX])));
            r[REG_RAX] = low | 0x60000, r[REG_RDX] = high;          // XTILECFG, XTILEDATA
            r[REG_RIP] += 3;
        } else if (at[0] == 0x0F && at[1] == 0x05 && r[REG_RAX] == SYS_arch_prctl && r[REG_RDI] == 0x1023) {
            ++counts[permissions];
            permitted = permitted || r[REG_RSI] == 18;              // ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA
            r[REG_RAX] = r[REG_RSI] == 18 ? 0 : -22;
            r[REG_RIP] += 2;
            r[REG_RCX] = r[REG_RIP], r[REG_R11] = r[REG_EFL];
        } else {
            return;
        }
    }
}

// What checks of this file run.

#define TILE_CONFIGURE(c) asm volatile("ldtilecfg %0" : : "m"(c) : "memory")
#define TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_DOT(sum, a, b) asm volatile("tdpbf16ps %tmm" #b ", %tmm" #a ", %tmm" #sum)

// tdpbf16ps %tmm1, %tmm1, %tmm0, which no assembler takes.
#define SAME_TILES [] { asm volatile(".byte 0xC4, 0xE2, 0x72, 0x5C, 0xC1"); }

// Tiles of a product [rows x units] x [units x columns] in 0, 1 and 2.
Configuration shaped(int rows, int units, int columns) {
    Configuration c;
    c.rows[0] = c.rows[1] = static_cast<uint8_t>(rows);
    c.colsb[0] = c.colsb[2] = static_cast<uint16_t>(4 * columns);
    c.colsb[1] = static_cast<uint16_t>(4 * units);
    c.rows[2] = static_cast<uint8_t>(units);
    return c;
}

void with(Configuration c, void (*use)() = nullptr) {
    TILE_CONFIGURE(c);
    if (use != nullptr) use();
}

struct Fault {
    const char* reason;
    void (*run)();
};

uint32_t numbers[max_rows][max_colsb / 4];

const Fault faults[] = {
    {"a tile is used without LDTILECFG", [] { asm volatile("tilezero %tmm0"); }},
    {"a tile is used without LDTILECFG", [] { with(shaped(16, 16, 16), [] { asm volatile("tilerelease\n tilezero %tmm0"); }); }},
    {"a palette other than", [] { auto c = shaped(16, 16, 16); c.palette = 2; with(c); }},
    {"reserved bytes", [] { auto c = shaped(16, 16, 16); c.reserved[13] = 1; with(c); }},
    {"bytes per row of a tile beyond", [] { auto c = shaped(16, 16, 16); c.colsb[8] = 64; with(c); }},
    {"rows of a tile beyond", [] { auto c = shaped(16, 16, 16); c.rows[15] = 16; with(c); }},
    {"more than 64 bytes", [] { with(shaped(16, 17, 16)); }},
    {"more than 16 rows", [] { with(shaped(17, 16, 16)); }},
    {"rows of no bytes", [] { auto c = shaped(16, 16, 16); c.rows[3] = 1; with(c); }},
    {"leaves out", [] { with(shaped(16, 16, 16), [] { TILE_LOAD(3, numbers, 64); }); }},
    {"multiple of 4 bytes", [] { auto c = shaped(16, 16, 16); c.colsb[1] = 62; with(c, [] { TILE_LOAD(1, numbers, 64); }); }},
    {"start_row is not a row", [] { auto c = shaped(5, 16, 16); c.start_row = 5; with(c, [] { TILE_LOAD(0, numbers, 64); }); }},
    {"two of its tiles", [] { with(shaped(16, 16, 16), SAME_TILES); }},
    {"the units of A", [] { auto c = shaped(16, 16, 16); c.rows[2] = 15; with(c, [] { TILE_DOT(0, 1, 2); }); }},
    {"the rows of the sum", [] { auto c = shaped(16, 16, 16); c.rows[0] = 15; with(c, [] { TILE_DOT(0, 1, 2); }); }},
    {"the columns of the sum", [] { auto c = shaped(16, 16, 16); c.colsb[0] = 60; with(c, [] { TILE_DOT(0, 1, 2); }); }},
    {"without the system's permission", [] { with(shaped(16, 16, 16), [] { permitted = false; TILE_LOAD(0, numbers, 64); }); }},
};

}  // namespace

extern "C" {

void software_amx_install() {
    struct sigaction action = {};
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = on_ill;
    sigaction(SIGILL, &action, &before_ill);
    action.sa_sigaction = on_trap;
    sigaction(SIGTRAP, &action, nullptr);
}

void software_amx_step(int on) {
    if (on) {
        asm volatile("pushfq\n orq $0x100, (%%rsp)\n popfq" : : : "cc", "memory");
    } else {
        asm volatile("pushfq\n andq $~0x100, (%%rsp)\n popfq" : : : "cc", "memory");
    }
}

// By the order of `Count`.
uint64_t software_amx_count(int which) { return counts[which]; }

// Threads that have used tiles, and those whose tiles are configured now.
int software_amx_threads() { return num_states; }
int software_amx_configured() {
    int sum = 0;
    for (const State& s : states) sum += s.configured;
    return sum;
}

int software_amx_num_faults() { return sizeof(faults) / sizeof(faults[0]); }
const char* software_amx_fault(int which) { return faults[which].reason; }

// Why a processor would refuse what fault `which` does; nullptr where it would not.
const char* software_amx_refusal(int which) {
    sigjmp_buf here;
    const bool was_permitted = permitted;
    refusal = nullptr;
    on_refusal = &here;
    if (sigsetjmp(here, 1) == 0) faults[which].run();
    on_refusal = nullptr;
    permitted = was_permitted;
    asm volatile("tilerelease");
    return refusal;
}

// sum[rows][columns] += a[rows][units] b[units][columns], units being pairs of bf16, through tiles of just that shape.
void software_amx_product(int rows, int units, int columns, const uint32_t* a, const uint32_t* b, float* sum) {
    TILE_CONFIGURE(shaped(rows, units, columns));
    TILE_LOAD(0, sum, 4 * columns);
    asm volatile("tileloaddt1 (%0,%1,4), %%tmm1" : : "r"(a), "r"(static_cast<int64_t>(units)) : "memory");
    TILE_LOAD(2, b, 4 * columns);
    TILE_DOT(0, 1, 2);
    TILE_STORE(0, sum, 4 * columns);
    asm volatile("tilerelease");
}

// Whether this thread's tiles are configured in a scope, in one inside it, behind that one, and after an exception: four
// bits.
int software_amx_scopes() {
    hlk::Engine engine{};
    engine.begin = [] { with(shaped(16, 16, 16)); };
    engine.end = [] { asm volatile("tilerelease"); };
    int seen = 0;
    auto look = [&] { seen = seen << 1 | state().configured; };
    try {
        hlk::EngineScope outer(engine);
        look();
        {
            hlk::EngineScope inner(engine);
            look();
        }
        look();
        throw 1;
    } catch (int) {
        look();
    }
    return seen;
}

}  // extern "C"
