//! The messages between `echo-server` and its strict client.
//!
//! Both directions are numbered: the client counts its messages per
//! connection, the server counts its replies, and each checks the other. The
//! payload follows from connection and number, so either side notices a byte
//! that is missing, repeated or changed.
//!
//! All integers are big-endian.
//!
//! ```text
//! request  "MEQ1" kind:u32 connection:u64 number:u64 length:u32 payload
//! reply    "MER1" kind:u32 connection:u64 number:u64 replies:u64
//!                 lost:u32 doubled:u32 wrong:u32 length:u32 payload
//! ```

/// First bytes of a request.
pub const REQUEST_MAGIC: [u8; 4] = *b"MEQ1";
/// First bytes of a reply.
pub const REPLY_MAGIC: [u8; 4] = *b"MER1";
/// Bytes of a request before its payload.
pub const REQUEST_HEADER_BYTES: usize = 28;
/// Bytes of a reply before its payload.
pub const REPLY_HEADER_BYTES: usize = 48;
/// Longest payload. More than one segment of a 1500-byte link, so that a
/// message is also caught between two segments.
pub const PAYLOAD_BYTES_MAX: usize = 2048;

/// What a message asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A numbered message to be echoed.
    Echo,
    /// The counters of the whole server, as JSON in the reply's payload. It
    /// takes a number like any other message.
    Stat,
}

impl Kind {
    const fn code(self) -> u32 {
        match self {
            Self::Echo => 1,
            Self::Stat => 2,
        }
    }

    const fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Echo),
            2 => Some(Self::Stat),
            _ => None,
        }
    }
}

/// Why bytes are no message: the stream is out of step and stays so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the bytes are no message of the echo protocol")]
pub struct Malformed;

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Echo or stat.
    pub kind: Kind,
    /// The client's name for this connection.
    pub connection: u64,
    /// Contiguous per connection, from 1.
    pub number: u64,
    /// Length of the payload that follows.
    pub payload_bytes: usize,
}

impl Request {
    /// Appends the request with the payload that belongs to it.
    pub fn write(kind: Kind, connection: u64, number: u64, out: &mut Vec<u8>) {
        let length = match kind {
            Kind::Echo => payload_length(connection, number),
            Kind::Stat => 0,
        };
        out.extend_from_slice(&REQUEST_MAGIC);
        out.extend_from_slice(&kind.code().to_be_bytes());
        out.extend_from_slice(&connection.to_be_bytes());
        out.extend_from_slice(&number.to_be_bytes());
        put_length(length, out);
        payload(connection, number, length, out);
    }

    /// Reads a request's header.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when the bytes cannot be one.
    pub fn read(header: &[u8; REQUEST_HEADER_BYTES]) -> Result<Self, Malformed> {
        if header[..4] != REQUEST_MAGIC {
            return Err(Malformed);
        }
        Ok(Self {
            kind: Kind::from_code(u32_at(header, 4)).ok_or(Malformed)?,
            connection: u64_at(header, 8),
            number: u64_at(header, 16),
            payload_bytes: bounded(u32_at(header, 24))?,
        })
    }
}

/// The header of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Echo or stat.
    pub kind: Kind,
    /// The connection, as the request named it.
    pub connection: u64,
    /// The number of the request.
    pub number: u64,
    /// The server's own count of replies on this connection, from 1.
    pub replies: u64,
    /// Messages that the server found missing on this connection.
    pub lost: u32,
    /// Messages that the server saw again on this connection.
    pub doubled: u32,
    /// Messages whose payload or connection was wrong.
    pub wrong: u32,
    /// Length of the payload that follows.
    pub payload_bytes: usize,
}

impl Reply {
    /// Appends the header and `payload`, whose length replaces
    /// `payload_bytes`.
    pub fn write(&self, payload: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&REPLY_MAGIC);
        out.extend_from_slice(&self.kind.code().to_be_bytes());
        out.extend_from_slice(&self.connection.to_be_bytes());
        out.extend_from_slice(&self.number.to_be_bytes());
        out.extend_from_slice(&self.replies.to_be_bytes());
        out.extend_from_slice(&self.lost.to_be_bytes());
        out.extend_from_slice(&self.doubled.to_be_bytes());
        out.extend_from_slice(&self.wrong.to_be_bytes());
        put_length(payload.len(), out);
        out.extend_from_slice(payload);
    }

    /// Reads a reply's header.
    ///
    /// # Errors
    ///
    /// [`Malformed`] when the bytes cannot be one.
    pub fn read(header: &[u8; REPLY_HEADER_BYTES]) -> Result<Self, Malformed> {
        if header[..4] != REPLY_MAGIC {
            return Err(Malformed);
        }
        Ok(Self {
            kind: Kind::from_code(u32_at(header, 4)).ok_or(Malformed)?,
            connection: u64_at(header, 8),
            number: u64_at(header, 16),
            replies: u64_at(header, 24),
            lost: u32_at(header, 32),
            doubled: u32_at(header, 36),
            wrong: u32_at(header, 40),
            payload_bytes: bounded(u32_at(header, 44))?,
        })
    }
}

/// Counters of the whole server, the payload of a [`Kind::Stat`] reply.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stat {
    /// Connections accepted since the start.
    pub connections: u64,
    /// Messages received.
    pub messages: u64,
    /// Messages found missing.
    pub lost: u64,
    /// Messages seen again.
    pub doubled: u64,
    /// Wrong payloads and streams out of step.
    pub wrong: u64,
}

/// A payload's length follows from connection and number too: mostly short,
/// every sixteenth long.
#[must_use]
pub fn payload_length(connection: u64, number: u64) -> usize {
    let limit = if number.is_multiple_of(16) {
        PAYLOAD_BYTES_MAX
    } else {
        256
    };
    let limit = limit as u64;
    usize::try_from(scramble(connection, number) % limit).unwrap_or(0) + 1
}

/// Appends the payload of a message.
pub fn payload(connection: u64, number: u64, length: usize, out: &mut Vec<u8>) {
    let end = out.len() + length;
    let mut block = 0_u64;
    while out.len() < end {
        let bytes = scramble(connection ^ block.rotate_left(40), number).to_be_bytes();
        out.extend_from_slice(&bytes[..bytes.len().min(end - out.len())]);
        block += 1;
    }
}

/// The mixing step of `SplitMix64`: cheap, and every input bit reaches every
/// output bit.
#[must_use]
pub const fn scramble(a: u64, b: u64) -> u64 {
    let mut z = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn put_length(length: usize, out: &mut Vec<u8>) {
    debug_assert!(length <= PAYLOAD_BYTES_MAX);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
}

fn bounded(length: u32) -> Result<usize, Malformed> {
    match usize::try_from(length) {
        Ok(length) if length <= PAYLOAD_BYTES_MAX => Ok(length),
        _ => Err(Malformed),
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(field)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_the_round_trip() {
        let mut out = Vec::new();
        Request::write(Kind::Echo, 7, 16, &mut out);
        let header = out[..REQUEST_HEADER_BYTES].try_into().unwrap();
        let request = Request::read(header).unwrap();
        assert_eq!((request.connection, request.number), (7, 16));
        assert_eq!(out.len(), REQUEST_HEADER_BYTES + request.payload_bytes);

        let reply = Reply {
            kind: Kind::Echo,
            connection: 7,
            number: 16,
            replies: 3,
            lost: 4,
            doubled: 5,
            wrong: 6,
            payload_bytes: 2,
        };
        out.clear();
        reply.write(b"ab", &mut out);
        assert_eq!(
            Reply::read(out[..REPLY_HEADER_BYTES].try_into().unwrap()),
            Ok(reply)
        );
    }

    #[test]
    fn a_changed_magic_kind_or_length_is_refused() {
        let mut good = Vec::new();
        Request::write(Kind::Echo, 1, 1, &mut good);
        for at in [0, 3, 4, 7, 24] {
            let mut header: [u8; REQUEST_HEADER_BYTES] =
                good[..REQUEST_HEADER_BYTES].try_into().unwrap();
            header[at] ^= 0x80;
            assert_eq!(Request::read(&header), Err(Malformed), "byte {at}");
        }
    }

    #[test]
    fn neighbouring_payloads_differ() {
        let of = |connection, number| {
            let mut out = Vec::new();
            payload(connection, number, 64, &mut out);
            out
        };
        assert_eq!(of(1, 1), of(1, 1));
        assert_ne!(of(1, 1), of(1, 2));
        assert_ne!(of(1, 1), of(2, 1));
        assert_ne!(of(1, 1)[..8], of(1, 1)[8..16]);
    }
}
