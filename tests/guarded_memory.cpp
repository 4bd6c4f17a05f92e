// Memory of tensors and of the kernels' buffers that ends at a page which nobody may touch, for a process that preloads
// this.
//
// While guarded_memory(1) is on, what posix_memalign and aligned_alloc give (torch's tensors, the kernels' buffers) ends
// with the last byte before such a page, whatever alignment was asked for, and is full of bits that are nan in every
// dtype. Freed, it may not be touched either.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>

extern "C" {
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* data);
}

namespace {

constexpr size_t page = 4096, all_pages = size_t{1} << 20;

char* region = nullptr;
std::atomic<size_t> next_page{0};
std::atomic<uint64_t> given{0};
uint32_t pages_of[all_pages];   // of the block that begins in a page
std::atomic<bool> guarding{false};
std::atomic<int64_t> countdown{0};

void* allocate(size_t alignment, size_t size) {
    if (!guarding) return __libc_memalign(alignment, size);
    const size_t pages = (size + page - 1) / page + (size == 0), first = next_page.fetch_add(pages + 1);
    if (first + pages + 1 > all_pages) return nullptr;
    char* begin = region + first * page;
    if (mprotect(begin, pages * page, PROT_READ | PROT_WRITE) != 0) return nullptr;
    memset(begin, 0xFF, pages * page);
    char* data = begin + pages * page - (size > 0 ? size : 1);
    pages_of[(data - region) / page] = static_cast<uint32_t>(pages);
    ++given;
    return data;
}

}  // namespace

extern "C" {

int posix_memalign(void** out, size_t alignment, size_t size) {
    *out = allocate(alignment, size);
    return *out == nullptr ? ENOMEM : 0;
}

void* aligned_alloc(size_t alignment, size_t size) {
    if (countdown > 0 && --countdown == 0) return nullptr;
    return allocate(alignment, size);
}

void free(void* data) {
    auto* at = static_cast<char*>(data);
    if (region == nullptr || at < region || at >= region + all_pages * page) return __libc_free(data);
    const size_t first = (at - region) / page;
    char* begin = region + first * page;
    madvise(begin, pages_of[first] * page, MADV_DONTNEED);
    mprotect(begin, pages_of[first] * page, PROT_NONE);
}

// Turns it on or off; how many blocks it gave so far.
uint64_t guarded_memory(int on) {
    if (on && region == nullptr) {
        void* reserved = mmap(nullptr, all_pages * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (reserved == MAP_FAILED) abort();
        region = static_cast<char*>(reserved);
    }
    guarding = on != 0;
    return given;
}

// From now on the `count`th call of aligned_alloc gives nothing, once; 0: none. How many calls are left.
int64_t guarded_memory_fail(int64_t count) { return countdown.exchange(count); }

}  // extern "C"
