//! What `stream-server` and its clients say to each other.
//!
//! A connection begins with nine bytes of its client: a kind and a number, the
//! seed of every byte that follows.

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

/// The client sends until it closes its side; the server answers with a
/// [`Receipt`].
pub const UPLOAD: u8 = b'U';
/// The server sends until the client closes its side, and then a [`Receipt`].
pub const DOWNLOAD: u8 = b'D';
/// The server sends [`REPLY_BYTES`] and closes the connection.
pub const REQUEST: u8 = b'R';
/// The same, but the client closes first.
pub const POLITE_REQUEST: u8 = b'P';
/// The server sends [`BIG_REPLY_BYTES`] and closes the connection at once:
/// most of them are still in its kernel then.
pub const BIG_REQUEST: u8 = b'B';

/// The client closes its side at once; the server sends [`HALF_CHUNKS`] times
/// [`HALF_CHUNK_BYTES`] in as many times 5 ms, and closes.
pub const HALF_CLOSED: u8 = b'H';

/// See [`HALF_CLOSED`]: some seconds in all.
pub const HALF_CHUNKS: usize = 800;
/// See [`HALF_CLOSED`].
pub const HALF_CHUNK_BYTES: usize = 1000;

/// Bytes of a reply: more than one packet.
pub const REPLY_BYTES: usize = 2000;
/// Bytes of a reply that its client takes longer for: a send buffer's worth.
pub const BIG_REPLY_BYTES: usize = 1 << 20;

/// The first bytes of a connection.
#[must_use]
pub fn head(kind: u8, number: u64) -> [u8; 9] {
    let mut head = [kind; 9];
    head[1..].copy_from_slice(&number.to_be_bytes());
    head
}

/// Reads them.
///
/// # Errors
///
/// The stream ends before or fails.
pub fn read_head(stream: &mut impl Read) -> io::Result<(u8, u64)> {
    let mut kind = [0];
    let mut number = [0; 8];
    stream.read_exact(&mut kind)?;
    stream.read_exact(&mut number)?;
    Ok((kind[0], u64::from_be_bytes(number)))
}

/// Bytes that follow from a number and where they stand, so that any that are
/// lost, doubled or swapped are seen.
#[derive(Debug, Clone)]
pub struct Numbers {
    seed: u64,
    bytes: u64,
}

impl Numbers {
    /// Those of a number, from the first on.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { seed, bytes: 0 }
    }

    /// The next bytes. Their number has to be a multiple of eight, the last
    /// time aside.
    pub fn fill(&mut self, out: &mut [u8]) {
        for word in out.chunks_mut(8) {
            let value = (self.seed ^ (self.bytes / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
            self.bytes += word.len() as u64;
        }
    }

    /// How many there were so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// What has come over a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// How many bytes.
    pub bytes: u64,
    /// SHA-256 over them.
    pub digest: [u8; 32],
}

/// Bytes of an encoded [`Receipt`].
pub const RECEIPT_BYTES: usize = 40;

impl Receipt {
    /// Encodes it.
    #[must_use]
    pub fn bytes(&self) -> [u8; RECEIPT_BYTES] {
        let mut out = [0; RECEIPT_BYTES];
        out[..8].copy_from_slice(&self.bytes.to_be_bytes());
        out[8..].copy_from_slice(&self.digest);
        out
    }
}

/// Counts and hashes what is written to it.
#[derive(Debug, Default)]
pub struct Tally {
    bytes: u64,
    hash: Sha256,
}

impl Tally {
    /// What has been written.
    #[must_use]
    pub fn receipt(self) -> Receipt {
        Receipt {
            bytes: self.bytes,
            digest: self.hash.finalize().into(),
        }
    }
}

impl Write for Tally {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.hash.update(data);
        self.bytes += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_piece_of_the_bytes_is_like_another() {
        let (mut whole, mut first, mut second) = ([0; 160], [0; 80], [0; 80]);
        Numbers::new(7).fill(&mut whole);
        let mut numbers = Numbers::new(7);
        numbers.fill(&mut first);
        numbers.fill(&mut second);
        assert_eq!(whole, *[first, second].concat());
        assert_ne!(first, second);
        Numbers::new(8).fill(&mut second);
        assert_ne!(first, second);
    }
}
