//! Errors: a kind for programs, and one sentence that names the argument and the values for people.

use core::fmt::{self, Write};

/// What went wrong, for a program to act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument is out of range or inconsistent with another one.
    InvalidArgument,
    /// The request is valid, but this build or machine cannot do it.
    Unsupported,
    /// The workspace is too small or misaligned.
    WorkspaceTooSmall,
    /// The executor returned before every task had run.
    Executor,
    /// There is no usable device, driver or device code.
    DeviceUnavailable,
    /// Scratch memory could not be allocated.
    OutOfMemory,
    /// The device's driver or compiler reported an error.
    Device,
}

/// An [`ErrorKind`] and a sentence. Made without allocation; a sentence longer than
/// [`Error::CAPACITY`] bytes is cut.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    length: u8,
    text: [u8; Error::CAPACITY],
}

/// Result with [`Error`].
pub type Result<T> = core::result::Result<T, Error>;

impl Error {
    /// Longest sentence kept, in bytes.
    pub const CAPACITY: usize = 222;

    /// An error of `kind` that says `sentence`.
    pub fn new(kind: ErrorKind, sentence: fmt::Arguments<'_>) -> Self {
        let mut error = Error { kind, length: 0, text: [0; Self::CAPACITY] };
        // The only failure is a full buffer, and then the cut sentence is what we want.
        let _ = error.write_fmt(sentence);
        error
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The sentence that names the argument and the values.
    pub fn message(&self) -> &str {
        core::str::from_utf8(&self.text[..usize::from(self.length)]).unwrap_or("")
    }
}

impl Write for Error {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        let start = usize::from(self.length);
        let mut end = piece.len().min(Self::CAPACITY - start);
        while !piece.is_char_boundary(end) {
            end -= 1;
        }
        self.text[start..start + end].copy_from_slice(&piece.as_bytes()[..end]);
        self.length += end as u8;
        if end < piece.len() { Err(fmt::Error) } else { Ok(()) }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

impl core::error::Error for Error {}

/// Returns an invalid-argument error with a formatted sentence from the calling function.
macro_rules! invalid {
    ($($sentence:tt)*) => {
        return Err($crate::error::Error::new(
            $crate::error::ErrorKind::InvalidArgument,
            format_args!($($sentence)*),
        ))
    };
}
pub(crate) use invalid;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentence_is_kept() {
        let error = Error::new(ErrorKind::InvalidArgument, format_args!("k.shape[3] = {}", 64));
        assert_eq!(error.message(), "k.shape[3] = 64");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn long_sentence_is_cut_at_a_character() {
        let long = [0xc3u8, 0xa4].repeat(200);
        let long = core::str::from_utf8(&long).unwrap();
        let error = Error::new(ErrorKind::Unsupported, format_args!("x{long}"));
        assert!(error.message().len() > Error::CAPACITY - 3);
        assert!(error.message().ends_with('ä'));
    }
}
