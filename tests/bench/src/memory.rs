//! What the process holds in memory, as Linux counts it; nothing elsewhere.

use std::fs;

/// Starts the peak anew from what is resident now. False where that is not permitted.
pub fn reset_peak() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// The largest resident size since the last [`reset_peak`], in bytes.
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// The resident size, in bytes.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

fn status(name: &str) -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, name)
}

/// The number of kilobytes that follows `name`, as bytes.
fn field(status: &str, name: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_name() {
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nVmRSS:\t   12 kB\n";
        assert_eq!(field(status, "VmHWM:"), Some(2048 * 1024));
        assert_eq!(field(status, "VmRSS:"), Some(12 * 1024));
        assert_eq!(field(status, "VmSwap:"), None);
    }

    #[test]
    fn the_peak_remembers_what_was_freed() {
        if !reset_peak() {
            println!("SKIPPED: /proc/self/clear_refs cannot be written here");
            return;
        }
        let before = peak().expect("Linux says the peak");
        const SIZE: usize = 256 << 20;
        drop(std::hint::black_box(vec![1u8; SIZE]));
        let after = peak().expect("Linux says the peak");
        assert!(after >= before.max(SIZE as u64), "{before} before, {after} after");
    }
}
