//! The kernel's initramfs format: cpio, "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{Result, Write};

pub const DIRECTORY: u32 = 0o040_000;
pub const REGULAR: u32 = 0o100_000;
pub const LINK: u32 = 0o120_000;

/// Writes one entry after the other. Everything belongs to root.
pub struct Writer<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Writer<W> {
    pub fn new(to: W) -> Self {
        Self { to, inode: 0 }
    }

    /// An entry: its path without a leading slash, its kind and permissions, and what it holds.
    pub fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.inode += 1;
        let size = u32::try_from(content.len())
            .map_err(|_| std::io::Error::other(format!("{path} has more than 4 GiB")))?;
        // Links 1; owner, times and devices 0; the name's length counts its final zero.
        let (ino, name) = (self.inode, path.len() + 1);
        write!(
            self.to,
            "070701{ino:08x}{mode:08x}{0:08x}{0:08x}{1:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{name:08x}{0:08x}{path}\0",
            0, 1
        )?;
        const HEADER: usize = 110;
        self.pad(HEADER + name)?;
        self.to.write_all(content)?;
        self.pad(content.len())
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.to.flush()
    }

    fn pad(&mut self, written: usize) -> Result<()> {
        let zeroes = [0; 3];
        self.to
            .write_all(&zeroes[..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_contents_begin_at_multiples_of_four() {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes);
        writer.entry("a", DIRECTORY | 0o755, &[]).unwrap();
        writer.entry("a/bc", REGULAR | 0o644, b"hello").unwrap();
        writer.finish().unwrap();
        assert!(bytes.starts_with(b"070701"));
        let second = bytes.windows(4).position(|w| w == b"a/bc").unwrap() - 110;
        assert_eq!(
            (second % 4, &bytes[second..second + 6]),
            (0, &b"070701"[..])
        );
        let content = bytes.windows(5).position(|w| w == b"hello").unwrap();
        assert_eq!(content % 4, 0);
        assert_eq!(&bytes[second + 6 + 6 * 8..][..8], b"00000005");
        assert_eq!(&bytes[second + 6 + 11 * 8..][..8], b"00000005");
        assert_eq!(bytes.len() % 4, 0);
    }
}
