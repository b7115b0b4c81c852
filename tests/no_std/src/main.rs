//! Runs hyperattn-core where there is no std, no allocator, no C library and no loader: only static
//! buffers and two system calls. Exits with 0 when every comparison holds, else with 1.
#![no_std]
#![no_main]
// The byte loops in `memory` must not be compiled into calls of themselves.
#![no_builtins]

mod checks;
mod console;
mod inputs;
mod memory;
mod reference;
mod runtime;

use core::fmt::Write;

use console::Console;

/// What `_start` calls.
extern "C" fn program() -> ! {
    console::exit(match checks::run() {
        Ok(tables) => {
            let _ = writeln!(Console, "hyperattn-core without std: ok on {tables} kernel tables");
            0
        }
        Err(checks::Failed) => 1,
    })
}
