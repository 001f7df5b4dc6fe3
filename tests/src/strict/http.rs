//! GET over keep-alive; bodies are held against the first one of their path.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use sha2::{Digest, Sha256};

use super::dialogue::{Dialogue, Excerpt, Finding, Judged};

/// Most bytes of a reply's headers.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Most bytes of a body.
const BODY_BYTES_MAX: usize = 1024 * 1024;

type Hash = [u8; 32];

/// What each path answered first, to any connection.
pub(super) type Learned = Rc<RefCell<BTreeMap<String, Hash>>>;

pub(super) struct Http {
    host: String,
    paths: Vec<String>,
    /// Index of the next path.
    next: usize,
    owed: VecDeque<String>,
    last: Option<Hash>,
    learned: Learned,
}

impl Http {
    pub(super) fn new(host: String, paths: &[String], connection: usize, learned: Learned) -> Self {
        Self {
            host,
            paths: paths.to_vec(),
            next: connection,
            owed: VecDeque::new(),
            last: None,
            learned,
        }
    }

    fn check(&mut self, status: &str, body: &[u8]) -> (usize, Option<Finding>) {
        let hash: Hash = Sha256::digest(body).into();
        let before = self.last.replace(hash);
        let Some(path) = self.owed.front() else {
            return (
                0,
                Some(Finding::doubled(
                    1,
                    format!("a reply to no request: {status}"),
                )),
            );
        };
        if status != "HTTP/1.1 200 OK" {
            return (
                1,
                Some(Finding::wrong(format!(
                    "GET {path} was answered with {status}"
                ))),
            );
        }
        let right = *self
            .learned
            .borrow_mut()
            .entry(path.clone())
            .or_insert(hash);
        if right == hash {
            return (1, None);
        }
        if before == Some(hash) {
            let text = format!("a reply came again instead of the one for {path}");
            return (0, Some(Finding::doubled(1, text)));
        }
        (
            1,
            Some(Finding::wrong(format!(
                "another body for {path}: {}",
                Excerpt(body)
            ))),
        )
    }
}

impl Dialogue for Http {
    fn ask(&mut self, out: &mut Vec<u8>) -> usize {
        let path = self.paths[self.next % self.paths.len()].clone();
        self.next += 1;
        out.extend_from_slice(
            format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", self.host).as_bytes(),
        );
        self.owed.push_back(path);
        1
    }

    fn judge(&mut self, input: &[u8]) -> Judged {
        let out_of_step = |text: String| Judged::OutOfStep(Finding::wrong(text));
        if !input.starts_with(&b"HTTP/1."[..input.len().min(7)]) {
            return out_of_step(format!("no reply of HTTP: {}", Excerpt(input)));
        }
        let window = &input[..input.len().min(HEAD_BYTES_MAX)];
        let Some(head) = window.windows(4).position(|four| four == b"\r\n\r\n") else {
            if window.len() == HEAD_BYTES_MAX {
                return out_of_step("headers without an end".into());
            }
            return Judged::Incomplete;
        };
        let head_text = String::from_utf8_lossy(&input[..head]).into_owned();
        let length = head_text.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse::<usize>().ok())?
        });
        let Some(length) = length.filter(|length| *length <= BODY_BYTES_MAX) else {
            return out_of_step(format!(
                "no usable length: {}",
                Excerpt(head_text.as_bytes())
            ));
        };
        let end = head + 4 + length;
        let Some(body) = input.get(head + 4..end) else {
            return Judged::Incomplete;
        };
        let status = head_text.lines().next().unwrap_or_default();
        let (answered, finding) = self.check(status, body);
        for _ in 0..answered {
            self.owed.pop_front();
        }
        Judged::Reply {
            used: end,
            answered,
            finding,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(body: &str) -> Vec<u8> {
        format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }

    fn finding(judged: Judged) -> Option<Finding> {
        match judged {
            Judged::Reply { finding, .. } => finding,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_body_must_stay_the_same_and_come_once() {
        let paths = ["/a".to_owned(), "/b".to_owned()];
        let mut http = Http::new("h".into(), &paths, 0, Learned::default());
        let mut sink = Vec::new();
        for body in ["one", "two"] {
            http.ask(&mut sink);
            assert_eq!(finding(http.judge(&reply(body))), None);
        }
        http.ask(&mut sink);
        assert_eq!(
            finding(http.judge(&reply("two"))).map(|f| f.doubled),
            Some(1)
        );
        assert_eq!(
            finding(http.judge(&reply("onE"))).map(|f| f.doubled),
            Some(0)
        );
        assert_eq!(http.judge(&reply("one")[..20]), Judged::Incomplete);
        assert!(matches!(http.judge(b"\nHTTP/1.1"), Judged::OutOfStep(_)));
    }
}
