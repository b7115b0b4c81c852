//! The two system calls: writing to standard output, and the end of the process.

use core::arch::asm;
use core::fmt;

const WRITE: usize = 1;
const EXIT_GROUP: usize = 231;
const STANDARD_OUTPUT: usize = 1;

/// Standard output.
pub(crate) struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let written: isize;
            // SAFETY: write reads rest.len() bytes at rest and nothing else; the kernel overwrites
            // rax, rcx and r11.
            unsafe {
                asm!(
                    "syscall",
                    inlateout("rax") WRITE as isize => written,
                    in("rdi") STANDARD_OUTPUT,
                    in("rsi") rest.as_ptr(),
                    in("rdx") rest.len(),
                    lateout("rcx") _,
                    lateout("r11") _,
                    options(nostack, readonly),
                );
            }
            let written = usize::try_from(written).map_err(|_| fmt::Error)?;
            rest = rest.get(written..).ok_or(fmt::Error)?;
        }
        Ok(())
    }
}

/// Ends the process.
pub(crate) fn exit(status: i32) -> ! {
    // SAFETY: exit_group takes the status and does not return.
    unsafe {
        asm!("syscall", in("rax") EXIT_GROUP, in("rdi") status, options(noreturn, nostack));
    }
}
