//! What std and the C runtime would bring: the entry point, the panic handler, the unwinder's symbols.

use core::fmt::Write;
use core::panic::PanicInfo;

use crate::console::{self, Console};

/// Where the kernel starts the process.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    // A call from a stack aligned to 16 bytes is what the ABI promises to `program`.
    core::arch::naked_asm!(
        "xor ebp, ebp",
        "and rsp, -16",
        "call {program}",
        "ud2",
        program = sym crate::program,
    );
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(Console, "FAILED: {info}");
    console::exit(1)
}

/// Named in the unwind tables of the precompiled libcore; never called, because panics end the process.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() -> ! {
    console::exit(1)
}

/// As [`rust_eh_personality`].
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    console::exit(1)
}
