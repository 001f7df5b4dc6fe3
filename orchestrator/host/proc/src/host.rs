//! What a host is, and whether two of them fit a tree.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use migrate_core::facts::{CriuVersion, HostFacts, TreeFacts};
use migrate_core::preflight::Finding;

use crate::tree::own_ancestors;
use crate::{kernel, parse, read};

/// Room for the images besides memory pages, in bytes: they come to some
/// hundred KiB for a plain tree, to a few MiB with thousands of descriptors.
const IMAGES_OVERHEAD_BYTES: u64 = 16 << 20;

/// Capabilities, their numbers (`linux/capability.h`), and what is impossible
/// without them.
const CAPABILITIES: [(&str, u32, &str); 9] = [
    ("CAP_KILL", 5, "a tree of another user cannot be stopped"),
    ("CAP_SETGID", 6, "a copy cannot be given its groups"),
    ("CAP_SETUID", 7, "a copy cannot be given its user"),
    ("CAP_NET_ADMIN", 12, "no gate and no address can be moved"),
    ("CAP_NET_RAW", 13, "an address cannot be announced"),
    ("CAP_SYS_PTRACE", 19, "CRIU cannot seize a process"),
    ("CAP_SYS_ADMIN", 21, "no process can be dumped or restored"),
    ("CAP_BPF", 39, "the gate's programs cannot be loaded"),
    (
        "CAP_CHECKPOINT_RESTORE",
        40,
        "a copy cannot have the PIDs it had",
    ),
];

/// What root needs for the limits of other users' processes: without it
/// `prlimit(2)` is for processes of the caller's own user.
const RESOURCE: (&str, u32) = ("CAP_SYS_RESOURCE", 24);

/// What it takes to go before others, see [`crate::Precedence`].
const NICE: (&str, u32) = ("CAP_SYS_NICE", 23);

/// What this host is. CRIU's version is for the caller to fill in, or to refuse.
/// What else cannot be found out is left empty or zero, which the comparison
/// refuses.
#[must_use]
pub fn host_facts(image_dir: &Path) -> HostFacts {
    let uname = nix::sys::utsname::uname().ok();
    let field = |get: fn(&nix::sys::utsname::UtsName) -> &std::ffi::OsStr| {
        uname
            .as_ref()
            .map(|uname| get(uname).to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let memory = read::text("/proc/meminfo").unwrap_or_default();
    HostFacts {
        hostname: field(|uname| uname.nodename()),
        kernel: field(|uname| uname.release()),
        machine: field(|uname| uname.machine()),
        cpu_flags: cpu_flags(&read::text("/proc/cpuinfo").unwrap_or_default()),
        criu: None,
        memory_available_bytes: parse::kilobytes(&memory, "MemAvailable").unwrap_or(0),
        image_space_bytes: free_space(image_dir).unwrap_or(0),
        swaps_to: Vec::new(),
        missing_capabilities: missing_capabilities(),
        rseq: kernel::rseq(),
        vdso: kernel::vdso(),
    }
}

/// The flags of the first processor, sorted; x86 and arm64 name the line
/// differently.
fn cpu_flags(cpuinfo: &str) -> Vec<String> {
    let line = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        matches!(name.trim(), "flags" | "Features").then_some(value)
    });
    let flags: BTreeSet<&str> = line.unwrap_or_default().split_ascii_whitespace().collect();
    flags.into_iter().map(str::to_owned).collect()
}

/// Free space of the file system that has, or is to have, the directory.
fn free_space(directory: &Path) -> Option<u64> {
    directory.ancestors().find_map(|directory| {
        let stat = nix::sys::statvfs::statvfs(directory).ok()?;
        stat.blocks_available().checked_mul(stat.fragment_size())
    })
}

/// Whether this process may lock as much memory as it likes (`CAP_IPC_LOCK`).
#[must_use]
pub fn may_lock_memory() -> bool {
    /// Of `linux/capability.h`.
    const IPC_LOCK: u32 = 14;
    let status = read::text("/proc/self/status").unwrap_or_default();
    effective_capabilities(&status) & (1 << IPC_LOCK) != 0
}

fn effective_capabilities(status: &str) -> u64 {
    parse::value(status, "CapEff")
        .and_then(|mask| u64::from_str_radix(mask, 16).ok())
        .unwrap_or(0)
}

/// Capabilities that a migration makes use of and that this process lacks.
pub(crate) fn missing_capabilities() -> Vec<String> {
    missing_of(&read::text("/proc/self/status").unwrap_or_default())
}

fn missing_of(status: &str) -> Vec<String> {
    let effective = effective_capabilities(status);
    CAPABILITIES
        .iter()
        .map(|(name, number, _)| (*name, *number))
        .chain([RESOURCE, NICE])
        .filter(|(_, number)| effective & (1 << number) == 0)
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// What the capabilities cost that a host does not have, one by one.
fn judge_capabilities(host: &HostFacts, side: &str, tree: &TreeFacts) -> Vec<Finding> {
    const WAY_OUT: &str = "run as root outside a container, or give the container this capability";
    let other_user = tree
        .processes
        .iter()
        .find(|process| process.credentials.users.iter().any(|user| *user != 0));
    let mut findings = Vec::new();
    for name in &host.missing_capabilities {
        let subject = format!("rights on the {side}");
        let cost = CAPABILITIES.iter().find(|(known, ..)| known == name);
        if let Some((_, _, cost)) = cost {
            let finding = format!("lacks {name}: {cost}");
            findings.push(Finding::refused(subject, finding, WAY_OUT));
        } else if let (true, Some(process)) = (name == RESOURCE.0, other_user) {
            let finding = format!(
                "lacks {name}: CRIU cannot handle the limits of process {} ({}), which is another \
                 user's; trees of root alone can be moved",
                process.pid, process.name
            );
            findings.push(Finding::refused(subject, finding, WAY_OUT));
        } else if name == NICE.0 {
            let finding =
                format!("lacks {name}: the blackout is longer while this host has much else to do");
            findings.push(Finding::note(subject, finding, WAY_OUT));
        }
    }
    findings
}

/// On the destination: whether the tree's ids are free. CRIU gives a restored
/// process the PID it had, and its threads and groups their ids. A number is
/// also taken while it only names somebody's session or process group.
#[must_use]
pub fn compare_pids(tree: &TreeFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let wanted = wanted_ids(tree);
    let largest = wanted.keys().next_back().copied().unwrap_or(0);
    let limit: i32 = read::text("/proc/sys/kernel/pid_max")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(i32::MAX);
    if largest >= limit {
        findings.push(Finding::refused(
            format!("pid {largest}"),
            format!("is beyond what the destination gives out (kernel.pid_max = {limit})"),
            format!(
                "on the destination: sysctl -w kernel.pid_max={}",
                largest.saturating_add(1).max(4_194_304)
            ),
        ));
    }
    let named = named_by_others(&wanted);
    let ancestors = own_ancestors().unwrap_or_default();
    for (&id, what) in &wanted {
        let subject = format!("{what} {id}");
        // This process, its threads and the login that started it come with
        // each attempt and get other ids the next time.
        let thread = read::of(read::own_pid(), "task").join(id.to_string());
        if thread.exists() || (id > 1 && ancestors.contains(&id)) {
            findings.push(Finding::refused(
                subject,
                "is taken on the destination by this migration's own agent",
                "run the same command again: the agent then has other ids",
            ));
            continue;
        }
        // A thread id answers under /proc too, though it is not listed.
        if let Ok(Some(stat)) = read::stat(id) {
            let state = if stat.has_ended() {
                " that has ended but was not reaped"
            } else {
                ""
            };
            findings.push(Finding::refused(
                subject,
                format!("is taken on the destination by {}{state}", stat.name),
                format!(
                    "end or restart PID {id} there, or restart the workload here to give it \
                     another PID"
                ),
            ));
        } else if let Some((pid, role)) = named.get(&id) {
            findings.push(Finding::refused(
                subject,
                format!(
                    "still names the {role} of {} (PID {pid}) on the destination",
                    read::name(*pid)
                ),
                format!("end PID {pid} there"),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(
            "pids",
            format!("all {} process and thread ids are free", wanted.len()),
        ));
    }
    findings
}

/// Ids the restore has to hand out, and what for: `pid`, `thread`, `session` or
/// `process group`.
#[must_use]
pub fn wanted_ids(tree: &TreeFacts) -> BTreeMap<i32, &'static str> {
    let mut wanted = BTreeMap::new();
    for process in &tree.processes {
        for &thread in &process.threads {
            wanted.insert(thread, "thread");
        }
    }
    for process in &tree.processes {
        wanted.insert(process.pid, "pid");
    }
    let root = tree.processes.first();
    for process in &tree.processes {
        // A leader outside the tree gets a stand-in that has its PID, except
        // that a shell job's root takes over CRIU's own session and group.
        let taken_over = |id: i32| {
            tree.shell_job
                && root.is_some_and(|root| {
                    (id == root.session && root.session != root.pid)
                        || (id == root.group && root.group != root.pid)
                })
        };
        for (id, what) in [
            (process.session, "session"),
            (process.group, "process group"),
        ] {
            if id > 0 && !taken_over(id) {
                wanted.entry(id).or_insert(what);
            }
        }
    }
    wanted
}

/// Wanted ids that name a session or group of somebody on this host.
fn named_by_others(wanted: &BTreeMap<i32, &'static str>) -> BTreeMap<i32, (i32, &'static str)> {
    let mut named = BTreeMap::new();
    for pid in read::numbers("/proc").unwrap_or_default() {
        let Ok(Some(stat)) = read::stat(pid) else {
            continue;
        };
        for (id, role) in [(stat.session, "session"), (stat.group, "process group")] {
            if wanted.contains_key(&id) {
                named.entry(id).or_insert((pid, role));
            }
        }
    }
    named
}

/// Whether a tree of `source` can live on `destination`: machine, processor,
/// CRIU, memory, space, rights.
#[must_use]
pub fn compare_hosts(
    source: &HostFacts,
    destination: &HostFacts,
    tree: &TreeFacts,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if source.machine != destination.machine {
        findings.push(Finding::refused(
            "machine",
            format!(
                "the source is {} and the destination {}",
                source.machine, destination.machine
            ),
            "choose a destination of the same architecture",
        ));
    } else {
        findings.push(compare_cpu(source, destination));
    }
    findings.extend(compare_criu(source.criu, destination.criu));
    if source.machine == destination.machine {
        findings.extend(migrate_core::kernel::compare(source, destination));
    }
    findings.push(compare_memory(destination, tree));
    findings.push(compare_space(destination, tree));
    for (host, side) in [(source, "source"), (destination, "destination")] {
        findings.extend(judge_capabilities(host, side, tree));
        findings.extend(judge_swap(host, side));
        if kernel_release(&host.kernel).is_some_and(|release| release < OLDEST_KERNEL) {
            findings.push(Finding::refused(
                format!("kernel of the {side}"),
                format!(
                    "{} cannot hold a gate in front of its interfaces",
                    host.kernel
                ),
                format!("use Linux {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
            ));
        }
    }
    if kernel_release(&destination.kernel) < kernel_release(&source.kernel) {
        findings.push(Finding::note(
            "kernel",
            format!(
                "the destination's {} is older than the source's {}",
                destination.kernel, source.kernel
            ),
            "a feature that only the newer one has is found missing at the restore, and the \
             migration rolls back",
        ));
    }
    findings
}

/// The oldest kernel on which the gate has been tried.
const OLDEST_KERNEL: (u32, u32) = (6, 1);

/// Major and minor number of a `uname -r`.
fn kernel_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Whether a program may have chosen its instructions by this flag. Most of
/// an x86 flags line is about the kernel, virtualisation or errata instead.
fn is_instruction_set(machine: &str, flag: &str) -> bool {
    if machine != "x86_64" {
        // arm64 lists its hwcaps, which are all for programs.
        return true;
    }
    const PREFIXES: [&str; 9] = [
        "sse", "avx", "amx", "bmi", "sha", "xsave", "fma", "vaes", "vpclmul",
    ];
    const NAMES: [&str; 38] = [
        "3dnowprefetch",
        "abm",
        "adx",
        "aes",
        "cldemote",
        "clflushopt",
        "clwb",
        "clzero",
        "cmov",
        "cx16",
        "cx8",
        "enqcmd",
        "erms",
        "f16c",
        "fsgsbase",
        "fsrm",
        "fxsr",
        "gfni",
        "lahf_lm",
        "lzcnt",
        "mmx",
        "movbe",
        "movdir64b",
        "movdiri",
        "ospke",
        "pclmulqdq",
        "pku",
        "pni",
        "popcnt",
        "rdpid",
        "rdrand",
        "rdseed",
        "rdtscp",
        "rtm",
        "serialize",
        "ssse3",
        "tbm",
        "waitpkg",
    ];
    NAMES.contains(&flag)
        || PREFIXES.iter().any(|prefix| flag.starts_with(prefix))
        || matches!(flag, "xop" | "user_shstk" | "uintr" | "sm3" | "sm4")
}

fn compare_cpu(source: &HostFacts, destination: &HostFacts) -> Finding {
    let here: BTreeSet<&String> = destination.cpu_flags.iter().collect();
    let missing: Vec<&str> = source
        .cpu_flags
        .iter()
        .filter(|flag| !here.contains(flag) && is_instruction_set(&source.machine, flag))
        .map(String::as_str)
        .collect();
    if missing.is_empty() {
        return Finding::ok(
            "processor",
            "has every instruction the source's has".to_owned(),
        );
    }
    Finding::refused(
        "processor",
        format!("lacks {} on the destination", missing.join(", ")),
        "choose a destination with the same or a newer processor, or start both virtual machines \
         with a common processor model",
    )
}

fn compare_criu(source: Option<CriuVersion>, destination: Option<CriuVersion>) -> Vec<Finding> {
    let install = "run scripts/setup on that host, or point MIGRATE_CRIU at a newer one";
    let mut findings = Vec::new();
    for (version, side) in [(source, "source"), (destination, "destination")] {
        let subject = format!("CRIU on the {side}");
        match version {
            // Whoever looked for it in vain has said why.
            None => {}
            Some(version) if version < CriuVersion::OLDEST_SUPPORTED => {
                findings.push(Finding::refused(
                    subject,
                    format!(
                        "is {version}, and {} is the oldest that works",
                        CriuVersion::OLDEST_SUPPORTED
                    ),
                    install,
                ));
            }
            Some(_) => {}
        }
    }
    if let (Some(source), Some(destination)) = (source, destination) {
        let release = |version: CriuVersion| (version.major, version.minor);
        if release(destination) < release(source) {
            findings.push(Finding::refused(
                "CRIU",
                format!("{destination} on the destination is older than {source} on the source"),
                install,
            ));
        } else if findings.is_empty() {
            findings.push(Finding::ok(
                "CRIU",
                format!("{source} on the source, {destination} on the destination"),
            ));
        }
    }
    findings
}

fn compare_memory(destination: &HostFacts, tree: &TreeFacts) -> Finding {
    let (has, needs) = (destination.memory_available_bytes, tree.resident_bytes);
    let finding = format!("the tree needs {}, {} are available", mib(needs), mib(has));
    if has < needs {
        return Finding::refused(
            "memory",
            finding,
            "free memory on the destination or choose another",
        );
    }
    if has < needs.saturating_mul(2) {
        return Finding::note(
            "memory",
            format!("{finding}; while it is restored, images and memory exist side by side"),
            "free memory on the destination if the restore runs out of it",
        );
    }
    Finding::ok("memory", finding)
}

/// Images and pages are for memory only. A host that swaps and cannot keep them
/// out of that is the user's to judge.
fn judge_swap(host: &HostFacts, side: &str) -> Option<Finding> {
    (!host.swaps_to.is_empty()).then(|| {
        Finding::note(
            format!("swap of the {side}"),
            format!(
                "the tree's memory may be written to {} while it is moved, and stay there",
                host.swaps_to.join(", ")
            ),
            "turn swap off for that time (swapoff -a), or have it encrypted; Linux 6.4 and newer \
             keep images out of it where MIGRATE_IMAGE_DIR names no other place",
        )
    })
}

fn compare_space(destination: &HostFacts, tree: &TreeFacts) -> Finding {
    let has = destination.image_space_bytes;
    let needs = tree.resident_bytes.saturating_add(IMAGES_OVERHEAD_BYTES);
    let finding = format!("the images need {}, {} are free", mib(needs), mib(has));
    if has < needs {
        return Finding::refused(
            "image space",
            finding,
            "on the destination: enlarge the tmpfs (mount -o remount,size=... on it) or choose \
             another directory",
        );
    }
    Finding::ok("image space", finding)
}

/// Bytes as a reader takes them in.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use migrate_core::facts::ProcessFacts;
    use migrate_core::preflight::{Severity, refused};

    use migrate_core::policy::Credentials;

    use super::*;

    fn host() -> HostFacts {
        HostFacts {
            hostname: "h".into(),
            kernel: "6.18.1-amd64".into(),
            machine: "x86_64".into(),
            cpu_flags: vec!["avx2".into(), "pti".into(), "sse2".into()],
            criu: Some(CriuVersion {
                major: 4,
                minor: 2,
                sublevel: 1,
            }),
            memory_available_bytes: 1 << 30,
            image_space_bytes: 1 << 30,
            swaps_to: Vec::new(),
            missing_capabilities: Vec::new(),
            rseq: None,
            vdso: None,
        }
    }

    fn facts(processes: Vec<ProcessFacts>) -> TreeFacts {
        TreeFacts {
            root_pid: processes[0].pid,
            processes,
            resident_bytes: 100 << 20,
            cgroup: "/".into(),
            ..TreeFacts::default()
        }
    }

    fn process(pid: i32, session: i32, group: i32) -> ProcessFacts {
        ProcessFacts {
            pid,
            parent: 1,
            start_ticks: 0,
            threads: vec![pid, pid + 1],
            name: "x".into(),
            session,
            group,
            credentials: Credentials::default(),
        }
    }

    /// Of one comparison, the subjects that stop a migration.
    fn stops(change: impl FnOnce(&mut HostFacts, &mut HostFacts)) -> Vec<String> {
        let (mut source, mut destination) = (host(), host());
        change(&mut source, &mut destination);
        compare_hosts(&source, &destination, &facts(vec![process(5, 5, 5)]))
            .into_iter()
            .filter(|finding| finding.severity == Severity::Refused)
            .inspect(|finding| assert!(!finding.way_out.is_empty(), "{finding:?}"))
            .map(|finding| finding.subject)
            .collect()
    }

    #[test]
    fn equal_hosts_fit() {
        assert!(stops(|_, _| {}).is_empty());
    }

    #[test]
    fn each_difference_stops_by_name() {
        assert_eq!(stops(|_, d| d.machine = "aarch64".into()), ["machine"]);
        assert_eq!(
            stops(|_, d| d.cpu_flags = vec!["sse2".into()]),
            ["processor"]
        );
        // Refused by whoever looked for it.
        assert!(stops(|_, d| d.criu = None).is_empty());
        let old = CriuVersion {
            major: 3,
            minor: 17,
            sublevel: 0,
        };
        assert_eq!(stops(|s, _| s.criu = Some(old)), ["CRIU on the source"]);
        let newer = CriuVersion {
            major: 4,
            minor: 3,
            sublevel: 0,
        };
        assert_eq!(stops(|s, _| s.criu = Some(newer)), ["CRIU"]);
        assert!(stops(|_, d| d.criu = Some(newer)).is_empty());
        assert_eq!(stops(|_, d| d.memory_available_bytes = 1 << 20), ["memory"]);
        assert_eq!(stops(|_, d| d.image_space_bytes = 1 << 20), ["image space"]);
        assert_eq!(
            stops(|_, d| d.missing_capabilities = vec!["CAP_BPF".into()]),
            ["rights on the destination"]
        );
        let two = vec!["CAP_KILL".into(), "CAP_NET_RAW".into()];
        assert_eq!(
            stops(|s, _| s.missing_capabilities = two),
            ["rights on the source"; 2]
        );
        assert_eq!(
            stops(|s, d| {
                s.kernel = "5.10.0-9".into();
                d.kernel = "6.6.1".into();
            }),
            ["kernel of the source"]
        );
    }

    #[test]
    fn limits_of_other_users_need_a_capability_of_their_own() {
        let mut lacking = host();
        lacking.missing_capabilities = vec!["CAP_SYS_RESOURCE".into()];
        let mut of_root = process(50, 50, 50);
        of_root.credentials.users = [0].into();
        let mut of_another = process(60, 50, 50);
        of_another.credentials.users = [0, 999].into();
        let alone = facts(vec![of_root.clone()]);
        assert!(judge_capabilities(&lacking, "source", &alone).is_empty());
        let findings = judge_capabilities(&lacking, "source", &facts(vec![of_root, of_another]));
        assert!(findings[0].finding.contains("process 60"), "{findings:?}");
        assert!(missing_of("CapEff:\t000001fffeffffff\n") == ["CAP_SYS_RESOURCE"]);
        assert!(missing_of("CapEff:\t000001ffffffffff\n").is_empty());
        assert_eq!(
            missing_of("CapEff:\t0000000000000000\n").len(),
            CAPABILITIES.len() + 2
        );
    }

    #[test]
    fn without_precedence_a_tree_can_move() {
        let mut lacking = host();
        lacking.missing_capabilities = missing_of("CapEff:\t000001ffff7fffff\n");
        let findings = judge_capabilities(&lacking, "source", &facts(vec![process(50, 50, 50)]));
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].severity, Severity::Note);
    }

    #[test]
    fn a_flag_that_is_the_kernels_does_not_stop() {
        assert!(stops(|_, d| d.cpu_flags.retain(|flag| flag != "pti")).is_empty());
    }

    #[test]
    fn ids_of_a_plain_tree_and_of_a_shell_job() {
        let daemon = facts(vec![process(50, 50, 50)]);
        assert_eq!(
            wanted_ids(&daemon).into_keys().collect::<Vec<_>>(),
            [50, 51]
        );
        let mut job = facts(vec![process(50, 40, 45), process(60, 40, 60)]);
        assert_eq!(
            wanted_ids(&job).into_keys().collect::<Vec<_>>(),
            [40, 45, 50, 51, 60, 61]
        );
        job.shell_job = true;
        assert_eq!(
            wanted_ids(&job).into_keys().collect::<Vec<_>>(),
            [50, 51, 60, 61]
        );
    }

    #[test]
    fn our_own_ids_are_taken() {
        let own = read::own_pid();
        let findings = compare_pids(&facts(vec![process(own, own, own)]));
        assert!(refused(&findings));
        let found = findings.iter().find(|f| f.subject == format!("pid {own}"));
        assert!(
            found.is_some_and(|f| f.way_out.contains("again")),
            "{findings:?}"
        );
    }

    #[test]
    fn a_pid_beyond_the_limit() {
        let findings = compare_pids(&facts(vec![process(i32::MAX - 1, 0, 0)]));
        assert!(
            findings.iter().any(|f| f.finding.contains("pid_max")),
            "{findings:?}"
        );
    }

    #[test]
    fn this_host_has_facts() {
        let facts = host_facts(Path::new("/tmp/not/there/yet"));
        assert!(!facts.kernel.is_empty() && !facts.machine.is_empty());
        assert!(facts.memory_available_bytes > 0 && facts.image_space_bytes > 0);
        assert!(facts.cpu_flags.is_sorted() && !facts.cpu_flags.is_empty());
        assert_eq!(facts.criu, None);
        // Its own programs run on it.
        let findings = migrate_core::kernel::compare(&facts, &facts);
        assert!(!findings.is_empty() && !refused(&findings), "{findings:?}");
    }

    #[test]
    fn releases() {
        assert_eq!(kernel_release("6.18.44-x"), Some((6, 18)));
        assert_eq!(kernel_release("nonsense"), None);
    }
}
