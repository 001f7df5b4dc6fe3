//! Which processes a tree has at this moment.

use std::fs;
use std::io;

use crate::error::MemoryError;
use crate::maps::proc_failed;

/// A process of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) pid: i32,
    /// PID of the parent; `None` for the root.
    pub(crate) parent: Option<i32>,
    /// `starttime` of its stat file: tells a reused PID.
    pub(crate) start_ticks: u64,
}

/// The processes below `root` and itself, parents before children. Zombies are
/// left out: they have no memory.
pub(crate) fn members(root: i32, limit: usize) -> Result<Vec<Member>, MemoryError> {
    let mut members: Vec<Member> = Vec::new();
    let mut waiting = vec![(root, None)];
    while let Some((pid, parent)) = waiting.pop() {
        let member = match start_ticks(pid) {
            Ok(Some(start_ticks)) => Member {
                pid,
                parent,
                start_ticks,
            },
            Ok(None) | Err(MemoryError::Gone { .. }) => {
                if pid == root {
                    return Err(MemoryError::Gone { pid });
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        // A process that changed its parent meanwhile may come up twice.
        if members.iter().any(|known| known.pid == pid) {
            continue;
        }
        if members.len() == limit {
            return Err(MemoryError::TooManyProcesses { limit });
        }
        members.push(member);
        waiting.extend(children(pid)?.into_iter().map(|child| (child, Some(pid))));
    }
    Ok(members)
}

fn children(pid: i32) -> Result<Vec<i32>, MemoryError> {
    let tasks = match fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(tasks) => tasks,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(proc_failed(pid, &format!("/proc/{pid}/task"), source)),
    };
    let mut children = Vec::new();
    for task in tasks.filter_map(Result::ok) {
        // A thread that has ended has no children any more.
        let text = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        children.extend(
            text.split_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    Ok(children)
}

/// `None` for a zombie.
fn start_ticks(pid: i32) -> Result<Option<u64>, MemoryError> {
    let path = format!("/proc/{pid}/stat");
    let bytes = fs::read(&path).map_err(|source| proc_failed(pid, &path, source))?;
    let text = String::from_utf8_lossy(&bytes);
    // The name in parentheses may hold anything; fields are counted from its end.
    let mut fields = text
        .rsplit_once(") ")
        .map(|(_, rest)| rest.split(' '))
        .ok_or_else(|| MemoryError::Format {
            path: path.clone(),
            line: text.clone().into_owned(),
        })?;
    if matches!(fields.next(), Some("Z" | "X")) {
        return Ok(None);
    }
    const STARTTIME_AFTER_STATE: usize = 18;
    fields
        .nth(STARTTIME_AFTER_STATE)
        .and_then(|ticks| ticks.parse().ok())
        .map(Some)
        .ok_or_else(|| MemoryError::Format {
            path,
            line: text.clone().into_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_tree_has_its_root_first_and_no_ended_process() {
        let own = std::process::id().cast_signed();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let found = members(own, 64).unwrap();
        assert_eq!((found[0].pid, found[0].parent), (own, None));
        assert!(found.iter().any(|m| m.pid == pid && m.parent == Some(own)));
        assert!(matches!(
            members(own, 1),
            Err(MemoryError::TooManyProcesses { limit: 1 })
        ));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(members(own, 64).unwrap().iter().all(|m| m.pid != pid));
        assert!(matches!(members(pid, 64), Err(MemoryError::Gone { .. })));
    }
}
