//! The text protocol: set, get and incr, alone and in pipelines.

use super::dialogue::{Dialogue, Dice, Expected, Judged, Malformed, Owed, line};
use super::keys::{Store, VALUE_BYTES_MAX};
use crate::echo_wire::scramble;

pub(super) struct Memcached {
    counter_key: String,
    value_key: String,
    counter: Option<u64>,
    value: Vec<u8>,
    /// Whether the value was read since it was set. It is not set again before
    /// that: a set that went astray would not be seen.
    read: bool,
    dice: Dice,
    owed: Owed,
}

impl Memcached {
    pub(super) fn new(run: u64, connection: usize) -> Self {
        Self {
            counter_key: format!("strict:{run:x}:{connection}:counter"),
            value_key: format!("strict:{run:x}:{connection}:value"),
            counter: None,
            value: Vec::new(),
            read: true,
            dice: Dice::new(scramble(run, connection as u64)),
            owed: Owed::new(b""),
        }
    }

    fn ask_one(&mut self, out: &mut Vec<u8>) {
        match self.dice.below(3) {
            0 => self.increment(out),
            _ if self.read => {
                let length = usize::try_from(self.dice.below(200)).unwrap_or(0) + 16;
                self.value = self.dice.text(length);
                self.read = false;
                store(&self.value_key, &self.value, out);
                self.owed.push(Expected::Exact(b"STORED\r\n".to_vec()));
            }
            _ => self.get(out),
        }
    }

    fn increment(&mut self, out: &mut Vec<u8>) {
        if let Some(counter) = &mut self.counter {
            *counter += 1;
            out.extend_from_slice(format!("incr {} 1\r\n", self.counter_key).as_bytes());
            self.owed.push(Expected::Counter(*counter));
        } else {
            // Unlike redis, it counts up only what is there.
            self.counter = Some(0);
            store(&self.counter_key, b"0", out);
            self.owed.push(Expected::Exact(b"STORED\r\n".to_vec()));
        }
    }

    fn get(&mut self, out: &mut Vec<u8>) {
        self.read = true;
        fetch(&self.value_key, out);
        let reply = entry(&self.value_key, &self.value);
        self.owed.push(Expected::Exact(reply));
    }
}

impl Dialogue for Memcached {
    fn ask(&mut self, out: &mut Vec<u8>) -> usize {
        let batch = self.dice.batch();
        for _ in 0..batch {
            self.ask_one(out);
        }
        batch
    }

    fn ask_last(&mut self, out: &mut Vec<u8>) -> usize {
        self.increment(out);
        if self.read {
            return 1;
        }
        self.get(out);
        2
    }

    fn judge(&mut self, input: &[u8]) -> Judged {
        match frame(input) {
            Ok(None) => Judged::Incomplete,
            Ok(Some(length)) => {
                let mut none = 0;
                let counter = self.counter.as_mut().unwrap_or(&mut none);
                self.owed.judge(&input[..length], counter)
            }
            Err(Malformed) => self.owed.out_of_step(input),
        }
    }
}

fn store(key: &str, value: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(format!("set {key} 0 0 {}\r\n", value.len()).as_bytes());
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn fetch(key: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("get {key}\r\n").as_bytes());
}

fn entry(key: &str, value: &[u8]) -> Vec<u8> {
    let head = format!("VALUE {key} 0 {}\r\n", value.len());
    [head.as_bytes(), value, b"\r\nEND\r\n"].concat()
}

/// As [`keys`](super::keys) are kept.
pub(super) const STORE: Store = Store {
    set: store,
    stored: b"STORED\r\n",
    get: fetch,
    entry,
    missing: b"END\r\n",
    frame,
};

/// The length of the reply at the front: a line, or a value up to its `END`.
fn frame(input: &[u8]) -> Result<Option<usize>, Malformed> {
    let Some(head) = line(input)? else {
        return Ok(None);
    };
    let text = std::str::from_utf8(&input[..head - 2]).map_err(|_| Malformed)?;
    if let Some(value) = text.strip_prefix("VALUE ") {
        let length = value.rsplit(' ').next().unwrap_or_default();
        let length: usize = length.parse().map_err(|_| Malformed)?;
        if length > VALUE_BYTES_MAX {
            return Err(Malformed);
        }
        const TAIL: &[u8] = b"\r\nEND\r\n";
        let end = head + length + TAIL.len();
        return match input.get(end - TAIL.len()..end) {
            None => Ok(None),
            Some(TAIL) => Ok(Some(end)),
            Some(_) => Err(Malformed),
        };
    }
    let known = ["STORED", "END", "NOT_FOUND", "ERROR"].contains(&text)
        || text.starts_with("SERVER_ERROR ")
        || text.starts_with("CLIENT_ERROR ")
        || (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    if known {
        Ok(Some(head))
    } else {
        Err(Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_cut_where_they_end() {
        assert_eq!(frame(b"12\r\nSTORED\r\n"), Ok(Some(4)));
        assert_eq!(frame(b"VALUE k 0 3\r\nabc\r\nEND\r\n"), Ok(Some(23)));
        assert_eq!(frame(b"VALUE k 0 3\r\nabc\r\nEND\r"), Ok(None));
        assert_eq!(frame(b"VALUE k 0 3\r\nabcd\r\nEND\r\n"), Err(Malformed));
        assert_eq!(frame(b"STORE\r\n"), Err(Malformed));
    }
}
