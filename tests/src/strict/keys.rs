//! Entries of a data store that are there before the first request, and are read back at the
//! end.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use super::Keys;
use super::dialogue::{Dice, Excerpt, Finding, Malformed};

/// Sent in one pipeline while filling and reading back.
const KEYS_PER_PIPELINE: u64 = 1_000;

/// How a data store is spoken to about entries.
pub(super) struct Store {
    /// Asks it to keep a value under a name.
    pub(super) set: fn(&str, &[u8], &mut Vec<u8>),
    /// Its reply when it has done so.
    pub(super) stored: &'static [u8],
    /// Asks for the value of a name.
    pub(super) get: fn(&str, &mut Vec<u8>),
    /// Its reply with the value of a name.
    pub(super) entry: fn(&str, &[u8]) -> Vec<u8>,
    /// Its reply when there is none.
    pub(super) missing: &'static [u8],
    /// The length of the reply at the front.
    pub(super) frame: fn(&[u8]) -> Result<Option<usize>, Malformed>,
}

/// Longest value of ours that a reply may announce.
pub const VALUE_BYTES_MAX: usize = 64 * 1024;

/// What a longer value repeats: making it up takes longer than sending it.
const DISTINCT_BYTES: usize = 256;

/// The value of `key:index`, which follows from the index.
fn key_value(index: u64, bytes: usize) -> Vec<u8> {
    let distinct = Dice::new(index).text(bytes.min(DISTINCT_BYTES));
    distinct.into_iter().cycle().take(bytes).collect()
}

fn key_name(index: u64) -> String {
    format!("key:{index}")
}

impl Store {
    /// Writes keys over a blocking stream.
    pub(super) fn populate(&self, stream: &mut TcpStream, keys: Keys) -> io::Result<()> {
        self.for_each_pipeline(
            stream,
            keys,
            |index, out| {
                let value = key_value(index, keys.value_bytes);
                (self.set)(&key_name(index), &value, out);
            },
            |_, reply| {
                if reply == self.stored {
                    Ok(())
                } else {
                    Err(io::Error::other(format!(
                        "a key to keep was answered with {}",
                        Excerpt(reply)
                    )))
                }
            },
        )
    }

    /// Reads keys back over a blocking stream, up to the first failure of
    /// the stream, and reports every value that is not right.
    pub(super) fn verify(
        &self,
        stream: &mut TcpStream,
        keys: Keys,
        mut report: impl FnMut(Finding),
    ) -> io::Result<()> {
        self.for_each_pipeline(
            stream,
            keys,
            |index, out| (self.get)(&key_name(index), out),
            |index, reply| {
                let name = key_name(index);
                let expected = (self.entry)(&name, &key_value(index, keys.value_bytes));
                if reply == self.missing {
                    report(Finding::lost(1, format!("{name} is gone")));
                } else if reply != expected {
                    let (expected, got) = (Excerpt(&expected), Excerpt(reply));
                    report(Finding::wrong(format!(
                        "{name} should be {expected}, is {got}"
                    )));
                }
                Ok(())
            },
        )
    }

    fn for_each_pipeline(
        &self,
        stream: &mut TcpStream,
        keys: Keys,
        ask: impl Fn(u64, &mut Vec<u8>),
        mut check: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut input = Vec::new();
        let mut chunk = vec![0; 64 * 1024];
        let mut first = 0;
        while first < keys.count {
            let end = keys.count.min(first + KEYS_PER_PIPELINE);
            let mut out = Vec::new();
            (first..end).for_each(|index| ask(index, &mut out));
            stream.write_all(&out)?;
            let mut index = first;
            while index < end {
                let mut used = 0;
                while let Some(length) = (self.frame)(&input[used..])
                    .map_err(|Malformed| io::Error::other("no reply of such a data store"))?
                    .filter(|_| index < end)
                {
                    check(index, &input[used..used + length])?;
                    used += length;
                    index += 1;
                }
                input.drain(..used);
                if index < end {
                    let count = stream.read(&mut chunk)?;
                    if count == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    input.extend_from_slice(&chunk[..count]);
                }
            }
            first = end;
        }
        if input.is_empty() {
            Ok(())
        } else {
            Err(io::Error::other(format!(
                "replies to no request: {}",
                Excerpt(&input)
            )))
        }
    }
}
