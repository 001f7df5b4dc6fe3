//! What about a tree stops a migration, or is worth knowing.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use migrate_core::preflight::{Finding, Severity};
use migrate_core::report::counted;
use migrate_core::wire::PAGE_BYTES;

use crate::descriptors::{Descriptor, Outside, is_terminal_major};
use crate::error::ProcError;
use crate::files::{DELETED, MappedFile, is_no_file};
use crate::tree::Tree;
use crate::{parse, read, tunnel};

/// Largest unnamed file that CRIU puts into its images unasked
/// (`DEFAULT_GHOST_LIMIT` in criu/include/cr_options.h, v4.2).
const GHOST_FILE_MAX_BYTES: u64 = 1 << 20;
/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of `linux/magic.h`: files in memory.
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58f6];

const PAGE: u64 = PAGE_BYTES as u64;

/// What to do about a ring, by its descriptor or its memory.
const WITHOUT_IO_URING: &str = "start the program without io_uring: its own setting, or `sysctl -w \
                                kernel.io_uring_disabled=2` before it starts";

/// How the kernel names a mapped System V segment.
const SYSTEM_V: &str = "/SYSV";

impl Tree {
    /// What stops the tree from being moved, or is worth knowing: namespaces,
    /// debuggers, descriptors and mappings that CRIU cannot carry, unnamed
    /// files, pipes to outside. TCP, Unix and netlink sockets are judged by
    /// `migrate-net`; standard streams are listed by [`Tree::stdio`] and have
    /// their own flag.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn findings(&self) -> Result<Vec<Finding>, ProcError> {
        let mut findings = Vec::new();
        self.judge_namespaces(&mut findings)?;
        self.judge_status(&mut findings)?;
        let descriptors = self.descriptors()?;
        let outside = self.pipes_held_outside(&descriptors)?;
        self.judge_descriptors(&descriptors, &mut findings);
        self.judge_pipes(&descriptors, &outside, &mut findings)?;
        self.judge_mappings(&self.mappings()?, &mut findings)?;
        self.judge_guarded_code(&mut findings)?;
        self.judge_program_files(&mut findings);
        if findings.is_empty() {
            findings.push(Finding::ok(
                format!("tree of PID {}", self.root()),
                format!(
                    "{}, {}, nothing that cannot be moved",
                    counted(self.processes.len(), "process"),
                    counted(self.tids().len(), "thread")
                ),
            ));
        }
        Ok(findings)
    }

    /// The root's IPC namespace, where it is not this command's: CRIU builds it
    /// anew, with all that System V has in it.
    fn own_ipc(&self) -> Result<Option<String>, ProcError> {
        let own = read::link("/proc/self/ns/ipc")?;
        let its = read::if_there(read::link(read::of(self.root(), "ns/ipc")))?;
        Ok(its.filter(|its| *its != own))
    }

    fn judge_namespaces(&self, findings: &mut Vec<Finding>) -> Result<(), ProcError> {
        let root = self.root();
        let own_ipc = self.own_ipc()?;
        if let Some(own_ipc) = &own_ipc {
            findings.push(Finding::note(
                self.named(root),
                format!(
                    "lives in an IPC namespace of its own ({own_ipc}), which moves with all its \
                     System V objects"
                ),
                "",
            ));
        }
        for process in self.living() {
            for (name, what) in [
                ("mnt", "mount"),
                ("net", "network"),
                ("pid", "PID"),
                ("pid_for_children", "PID"),
                ("user", "user"),
                ("ipc", "IPC"),
            ] {
                let file = format!("ns/{name}");
                let own = read::link(format!("/proc/self/{file}"))?;
                let Some(its) = read::if_there(read::link(read::of(process.pid, &file)))? else {
                    continue;
                };
                let refused = |known: &Finding| known.severity == Severity::Refused;
                if its == own
                    || (name == "ipc" && own_ipc.as_ref() == Some(&its))
                    || (name == "pid_for_children" && findings.iter().any(refused))
                {
                    continue;
                }
                // One line for a whole container, not one for each process.
                let finding =
                    format!("lives in another {what} namespace ({its}) than this command");
                if findings.iter().any(|known| known.finding == finding) {
                    continue;
                }
                findings.push(Finding::refused(
                    self.named(process.pid),
                    finding,
                    format!(
                        "run the command inside: nsenter --target {root} --mount --net --pid \
                         --ipc migrate ..."
                    ),
                ));
            }
        }
        Ok(())
    }

    fn judge_status(&self, findings: &mut Vec<Finding>) -> Result<(), ProcError> {
        for process in self.living() {
            let Some(status) = read::text_if_there(read::of(process.pid, "status"))? else {
                continue;
            };
            let subject = self.named(process.pid);
            let tracer: i32 = parse::value(&status, "TracerPid")
                .and_then(|pid| pid.parse().ok())
                .unwrap_or(0);
            if tracer != 0 {
                findings.push(Finding::refused(
                    subject.clone(),
                    format!("is traced by {} (PID {tracer})", read::name(tracer)),
                    format!("end the debugger or tracer: kill {tracer}"),
                ));
            }
            let locked = parse::kilobytes(&status, "VmLck").unwrap_or(0);
            if locked > 0 {
                if let Some(at) = locked_guard(process.pid)? {
                    findings.push(Finding::refused(
                        subject.clone(),
                        format!(
                            "has a guard page (MADV_GUARD_INSTALL) in locked memory, at {at:#x}, \
                             which CRIU cannot restore"
                        ),
                        "start the program without locking its memory (mlockall, mlock), or \
                         with another kind of guard page (PROT_NONE)",
                    ));
                }
                findings.push(Finding::note(
                    subject,
                    format!(
                        "has {} KiB of memory locked, and will on the destination",
                        locked / 1024
                    ),
                    "",
                ));
            }
        }
        Ok(())
    }

    fn judge_descriptors(&self, descriptors: &[Descriptor], findings: &mut Vec<Finding>) {
        let inside: BTreeSet<i32> = self.pids().into_iter().collect();
        let tunnels = descriptors.iter().filter(|d| tunnel::is_tunnel(d)).count();
        for descriptor in descriptors {
            let subject = format!("{} fd {}", self.named(descriptor.pid), descriptor.fd);
            if tunnel::is_tunnel(descriptor) {
                findings.push(tunnel::judge(subject, descriptor, tunnels));
                continue;
            }
            findings.extend(judge_descriptor(subject, descriptor, &inside));
        }
        let lockers: BTreeSet<i32> = descriptors
            .iter()
            .filter(|d| d.info.lines().any(|line| line.starts_with("lock:")))
            .map(|d| d.pid)
            .collect();
        for pid in lockers {
            findings.push(Finding::note(
                self.named(pid),
                "holds file locks; they are taken again on the destination and guard nothing \
                 between the two hosts",
                "",
            ));
        }
    }

    fn judge_pipes(
        &self,
        descriptors: &[Descriptor],
        outside: &Outside,
        findings: &mut Vec<Finding>,
    ) -> Result<(), ProcError> {
        let stdio: BTreeSet<(i32, i32)> = self
            .stdio_of(descriptors, outside)?
            .into_iter()
            .flat_map(|stream| stream.holders)
            .collect();
        let mut told = BTreeSet::new();
        for descriptor in descriptors.iter().filter(|d| d.kind() == libc::S_IFIFO) {
            let Some(holders) = outside.get(&descriptor.inode) else {
                continue;
            };
            if stdio.contains(&(descriptor.pid, descriptor.fd)) || !told.insert(descriptor.inode) {
                continue;
            }
            let others: Vec<String> = holders
                .iter()
                .take(3)
                .map(|pid| format!("{} (PID {pid})", read::name(*pid)))
                .collect();
            findings.push(Finding::refused(
                format!("{} fd {}", self.named(descriptor.pid), descriptor.fd),
                format!("is a pipe ({}) to {}", descriptor.link, others.join(", ")),
                format!(
                    "name the common ancestor as the PID so that both ends move, or start the \
                     workload without it: `exec {}>&-` in the shell that starts it",
                    descriptor.fd
                ),
            ));
        }
        Ok(())
    }

    fn judge_mappings(
        &self,
        mappings: &[MappedFile],
        findings: &mut Vec<Finding>,
    ) -> Result<(), ProcError> {
        let system_v_moves = self.own_ipc()?.is_some();
        let mut told: BTreeMap<(i32, String), ()> = BTreeMap::new();
        for file in mappings {
            if system_v_moves && file.mapping.path.starts_with(SYSTEM_V) {
                continue;
            }
            let Some(finding) = judge_mapping(&self.named(file.pid), file) else {
                continue;
            };
            // Several segments of one file make one finding.
            if told
                .insert((file.pid, file.mapping.path.clone()), ())
                .is_none()
            {
                findings.push(finding);
            }
        }
        Ok(())
    }

    /// CRIU looks for a vDSO at the start of all anonymous code. Where that is
    /// a guard page (`MADV_GUARD_INSTALL`) it brings the process down.
    fn judge_guarded_code(&self, findings: &mut Vec<Finding>) -> Result<(), ProcError> {
        for process in self.living() {
            let maps = read::text_if_there(read::of(process.pid, "maps"))?.unwrap_or_default();
            let guarded = maps
                .lines()
                .filter(|line| line.contains(" r-xp "))
                .filter_map(parse::mapping)
                .filter(|mapping| mapping.path.is_empty() || mapping.path.starts_with("[anon:"))
                .any(|mapping| {
                    guard_page(process.pid, mapping.start..mapping.start + PAGE).is_some()
                });
            if guarded {
                findings.push(Finding::refused(
                    self.named(process.pid),
                    "has executable memory that begins with a guard page (MADV_GUARD_INSTALL), at \
                     which CRIU would end it",
                    "start the program with another kind of guard page (PROT_NONE), or without \
                     the code generator that makes them",
                ));
            }
        }
        Ok(())
    }

    fn judge_program_files(&self, findings: &mut Vec<Finding>) {
        for process in self.living() {
            for (link, what) in [("cwd", "working directory"), ("root", "root directory")] {
                let path = read::link(read::of(process.pid, link)).unwrap_or_default();
                if path.ends_with(DELETED) {
                    findings.push(Finding::refused(
                        self.named(process.pid),
                        format!("stands in a {what} that was deleted ({path})"),
                        "restart it in a directory that exists",
                    ));
                }
            }
        }
    }
}

/// Kinds of anonymous inodes that CRIU 4.2 carries over (criu/files.c,
/// `dump_one_file`).
fn judge_anonymous(
    subject: String,
    kind: &str,
    descriptor: &Descriptor,
    inside: &BTreeSet<i32>,
) -> Option<Finding> {
    match kind {
        "eventfd" | "eventfd2" | "eventpoll" | "signalfd" | "timerfd" => None,
        "inotify" | "fanotify" => Some(Finding::note(
            subject,
            format!("watches files ({kind}); the watches are set again on the destination's files"),
            "",
        )),
        "pidfd" => judge_pidfd(subject, descriptor, inside),
        "io_uring" => Some(Finding::refused(
            subject,
            "is an io_uring, which CRIU cannot carry over",
            WITHOUT_IO_URING,
        )),
        "userfaultfd" => Some(Finding::refused(
            subject,
            "is a userfaultfd, which CRIU cannot carry over",
            "end what uses it: another migration of this tree, a debugger, or a garbage \
             collector's setting",
        )),
        "perf_event" => Some(Finding::refused(
            subject,
            "is a performance counter (perf_event), which CRIU cannot carry over",
            "switch the program's profiling off",
        )),
        kind if kind.starts_with("bpf") => Some(Finding::refused(
            subject,
            format!("is a BPF object ({kind}), which belongs to this host's kernel"),
            "move only processes that load no BPF",
        )),
        kind if kind.starts_with("kvm") => Some(Finding::refused(
            subject,
            format!("belongs to a virtual machine ({kind})"),
            "use the hypervisor's own live migration",
        )),
        kind => Some(Finding::refused(
            subject,
            format!("is of a kind that CRIU cannot carry over ({kind})"),
            "have the program close it before the migration",
        )),
    }
}

fn judge_pidfd(
    subject: String,
    descriptor: &Descriptor,
    inside: &BTreeSet<i32>,
) -> Option<Finding> {
    let pid: i32 = parse::value(&descriptor.info, "Pid")?.parse().ok()?;
    // -1: the process has ended.
    if pid == -1 || inside.contains(&pid) {
        return None;
    }
    Some(Finding::refused(
        subject,
        format!(
            "refers to {} (PID {pid}), which is not moved",
            read::name(pid)
        ),
        "end that process, or name its common ancestor as the PID so that both move",
    ))
}

fn judge_descriptor(
    subject: String,
    descriptor: &Descriptor,
    inside: &BTreeSet<i32>,
) -> Option<Finding> {
    let link = &descriptor.link;
    if let Some(kind) = parse::anonymous(link) {
        return judge_anonymous(subject, kind, descriptor, inside);
    }
    if parse::link_number(link, "pidfd").is_some() {
        return judge_pidfd(subject, descriptor, inside);
    }
    match descriptor.kind() {
        libc::S_IFCHR => judge_device(subject, descriptor),
        libc::S_IFBLK => Some(Finding::refused(
            subject,
            format!("is a block device ({link})"),
            "use a file instead",
        )),
        libc::S_IFREG if link.starts_with("/secretmem") => Some(Finding::refused(
            subject,
            "is secret memory, which no other process may read",
            "start the program with that feature off",
        )),
        libc::S_IFREG if link.starts_with("/proc/") => Some(Finding::note(
            subject,
            format!("has {link} open, which shows the destination's state after the move"),
            "",
        )),
        libc::S_IFREG if !is_no_file(link) => {
            judge_unnamed(subject, "is", link, descriptor.size_bytes, descriptor.links)
        }
        _ => None,
    }
}

/// A file that lost its name since it was opened or mapped.
fn judge_unnamed(
    subject: String,
    verb: &str,
    link: &str,
    size_bytes: u64,
    links: u64,
) -> Option<Finding> {
    let path = link.strip_suffix(DELETED)?;
    if links > 0 {
        return Some(Finding::refused(
            subject,
            format!("{verb} {path}, which was renamed or deleted but has another name"),
            "restart the program, so that it opens the file by its present name",
        ));
    }
    if size_bytes > GHOST_FILE_MAX_BYTES {
        return Some(Finding::refused(
            subject,
            format!(
                "{verb} {path}, which was deleted and has {} KiB (at most {} KiB travel along)",
                size_bytes / 1024,
                GHOST_FILE_MAX_BYTES / 1024
            ),
            "restart the program, if an upgrade replaced the file; else have it close the file",
        ));
    }
    Some(Finding::note(
        subject,
        format!("{verb} {path}, which was deleted; its contents travel along"),
        "",
    ))
}

/// Devices by number: Documentation/admin-guide/devices.txt.
fn judge_device(subject: String, descriptor: &Descriptor) -> Option<Finding> {
    let (major, minor) = (descriptor.major(), descriptor.minor());
    // 1 is /dev/null, zero, full, random, urandom, kmsg; of those, physical
    // memory and ports are the machine's own.
    match (major, minor) {
        (1, 1 | 2 | 4) => {}
        (1, _) => return None,
        (major, _) if is_terminal_major(major) => return None,
        _ => {}
    }
    let link = &descriptor.link;
    let (what, way_out) = match (major, minor) {
        (10, 229) => (
            "serves a FUSE file system, which is mounted on this host",
            "unmount it first",
        ),
        (10, 232) => ("is /dev/kvm", "use the hypervisor's own live migration"),
        _ => (
            "is a device of this host, which CRIU cannot carry over",
            "have the program close it, or start it without that device",
        ),
    };
    Some(Finding::refused(
        subject,
        format!("{what} ({link}, {major}:{minor})"),
        way_out,
    ))
}

fn judge_mapping(subject: &str, file: &MappedFile) -> Option<Finding> {
    let mapping = &file.mapping;
    let path = mapping.path.as_str();
    if path == "[uprobes]" {
        return Some(Finding::refused(
            subject,
            "was probed by a tracing tool and still carries the probe's page ([uprobes])",
            "restart the program after ending the tracing tool (bpftrace, perf probe)",
        ));
    }
    if path.starts_with(SYSTEM_V) {
        return Some(Finding::refused(
            subject,
            "uses System V shared memory of this host's IPC namespace, which it shares with others",
            "start the program in an IPC namespace of its own, which moves with it: `unshare \
             --ipc PROGRAM`, or PrivateIPC=yes in its unit",
        ));
    }
    if let Some(kind) = parse::anonymous(path) {
        // Such mappings come with a descriptor, unless that was closed.
        let way_out = match kind {
            "io_uring" => WITHOUT_IO_URING,
            _ => "start the program without that feature",
        };
        return Some(Finding::refused(
            subject,
            format!("has memory of a kind mapped that CRIU cannot carry over ({kind})"),
            way_out,
        ));
    }
    if path.starts_with("/dev/") && !path.starts_with("/dev/zero") && !path.starts_with("/dev/shm/")
    {
        return Some(Finding::refused(
            subject,
            format!("has memory of a device mapped ({path})"),
            "start the program without that device",
        ));
    }
    if is_no_file(path) || mapping.inode == 0 {
        return None;
    }
    if path.ends_with(DELETED) {
        return match std::fs::metadata(file.link()) {
            Ok(meta) => judge_unnamed(
                subject.to_owned(),
                "has mapped",
                path,
                meta.size(),
                meta.nlink(),
            ),
            // Unmapped since it was listed, or the process has ended: workers
            // come and go.
            Err(error) if read::is_gone(&error) => None,
            Err(error) => Some(Finding::refused(
                subject,
                format!("has mapped {path}, which cannot be examined: {error}"),
                "restart the program, so that it maps the file by its present name",
            )),
        };
    }
    if mapping.shared && mapping.writable && is_in_memory(path) {
        return Some(Finding::refused(
            subject,
            format!("shares memory through {path}, whose contents stay on this host"),
            "use anonymous shared memory instead (PostgreSQL: dynamic_shared_memory_type = mmap; \
             Java: -XX:+PerfDisableSharedMem)",
        ));
    }
    None
}

/// The first page by `MADV_GUARD_INSTALL`: bit 58 of its entry, see
/// `Documentation/admin-guide/mm/pagemap.rst`. None where the kernel cannot say.
fn guard_page(pid: i32, range: Range<u64>) -> Option<u64> {
    const GUARD: u64 = 1 << 58;
    /// Entries that are read at once, for 2 MiB of memory.
    const ENTRIES: usize = 512;
    const STEP: usize = ENTRIES * PAGE_BYTES;
    let pagemap = std::fs::File::open(read::of(pid, "pagemap")).ok()?;
    let mut entries = [0; ENTRIES * 8];
    for first in range.clone().step_by(STEP) {
        let count = ((range.end - first) / PAGE).min(ENTRIES as u64);
        let part = entries.get_mut(..usize::try_from(count).ok()? * 8)?;
        // Memory may go while it is looked at; the process, too.
        pagemap.read_exact_at(part, first / PAGE * 8).ok()?;
        let (pages, _) = part.as_chunks::<8>();
        if let Some(found) = pages
            .iter()
            .position(|entry| u64::from_ne_bytes(*entry) & GUARD != 0)
        {
            return Some(first + found as u64 * PAGE);
        }
    }
    None
}

/// Where there is a guard page in memory that is locked. The process runs, so both
/// have to be found once more: other memory may have come to that place in between.
fn locked_guard(pid: i32) -> Result<Option<u64>, ProcError> {
    let found = look_for_locked_guard(pid)?;
    if found.is_none() {
        return Ok(None);
    }
    Ok(look_for_locked_guard(pid)?.filter(|again| Some(*again) == found))
}

fn look_for_locked_guard(pid: i32) -> Result<Option<u64>, ProcError> {
    let smaps = read::text_if_there(read::of(pid, "smaps"))?.unwrap_or_default();
    let mut mapping = None;
    for line in smaps.lines() {
        if let Some(next) = parse::mapping(line) {
            mapping = Some(next);
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_ascii_whitespace().any(|flag| flag == "lo")
            && let Some(locked) = &mapping
            && let Some(at) = guard_page(pid, locked.start..locked.end)
        {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// Whether a file lies in a file system without storage behind it.
fn is_in_memory(path: &str) -> bool {
    nix::sys::statfs::statfs(path)
        .is_ok_and(|stat| MEMORY_FILE_SYSTEMS.contains(&stat.filesystem_type().0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_is_seen_by_its_memory() {
        let line = "7f0000000000-7f0000001000 rw-s 00000000 00:10 1063   anon_inode:[io_uring]";
        let mapping = parse::mapping(line).unwrap();
        let found = judge_mapping("server (PID 7)", &MappedFile { pid: 7, mapping }).unwrap();
        assert_eq!(found.severity, Severity::Refused);
        assert_eq!(found.subject, "server (PID 7)");
        assert!(found.finding.contains("(io_uring)"), "{found:?}");
        assert_eq!(found.way_out, WITHOUT_IO_URING);
    }
}
