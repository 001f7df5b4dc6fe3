//! What a service manager bounds a tree by, and the names it gives.

use serde::{Deserialize, Serialize};

/// What becomes of the tree's unit on a destination whose services systemd runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdoptChoice {
    /// The unit that the tree was the main process of, where the destination has
    /// it and it is down; else a scope.
    #[default]
    Auto,
    /// A scope of its own.
    Scope,
    /// None: the tree stays in the cgroup that it was restored in.
    None,
}

/// Where a tree stood among the source's units.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitFacts {
    /// The service whose main process it has.
    pub service: Option<String>,
    /// The slice that unit was in.
    pub slice: Option<String>,
    /// What bounded its cgroup, whoever had set it.
    pub limits: Limits,
}

/// What a cgroup allows those in it; `None` where nothing is said. Read from the
/// files of cgroup v2 (`Documentation/admin-guide/cgroup-v2.rst` in Linux).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// `memory.max`, in bytes.
    pub memory_max_bytes: Option<u64>,
    /// `memory.high`, in bytes.
    pub memory_high_bytes: Option<u64>,
    /// `memory.swap.max`, in bytes.
    pub swap_max_bytes: Option<u64>,
    /// `cpu.max`, in hundredths of a percent of one CPU.
    pub cpu_permyriad: Option<u64>,
    /// `cpu.weight`, where it is not that of everybody.
    pub cpu_weight: Option<u64>,
    /// `io.weight`, where it is not that of everybody.
    pub io_weight: Option<u64>,
    /// `pids.max`.
    pub tasks_max: Option<u64>,
}

/// `cpu.weight` and `io.weight` of a cgroup for which nobody has set one.
const WEIGHT_OF_ALL: u64 = 100;

impl Limits {
    /// Reads them with the help of `file`, which gives the text of a file of the
    /// cgroup by its name. What is not there, or has another form, bounds nothing.
    pub fn read(file: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name: &str| file(name)?.trim().parse().ok();
        let weight = |name: &str| {
            let text = file(name)?;
            // `io.weight` has a line for each device that differs, too.
            let text = text.lines().next()?.trim();
            let weight = text.strip_prefix("default ").unwrap_or(text).parse().ok()?;
            (weight != WEIGHT_OF_ALL).then_some(weight)
        };
        Self {
            memory_max_bytes: number("memory.max"),
            memory_high_bytes: number("memory.high"),
            swap_max_bytes: number("memory.swap.max"),
            cpu_permyriad: file("cpu.max").and_then(|text| {
                let (quota, period) = text.trim().split_once(' ')?;
                let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
                quota.checked_mul(10_000)?.checked_div(period)
            }),
            cpu_weight: weight("cpu.weight"),
            io_weight: weight("io.weight"),
            tasks_max: number("pids.max"),
        }
    }

    /// The same as settings of a unit (systemd.resource-control(5)).
    #[must_use]
    pub fn settings(&self) -> Vec<String> {
        let cpu = self.cpu_permyriad.map(|permyriad| {
            // What is less than the least setting is not nothing.
            let permyriad = permyriad.max(1);
            match (permyriad / 100, permyriad % 100) {
                // All that older ones take.
                (percent, 0) => format!("{percent}%"),
                (percent, rest) => format!("{percent}.{rest:02}%"),
            }
        });
        [
            ("MemoryMax", self.memory_max_bytes.map(|n| n.to_string())),
            ("MemoryHigh", self.memory_high_bytes.map(|n| n.to_string())),
            ("MemorySwapMax", self.swap_max_bytes.map(|n| n.to_string())),
            ("CPUQuota", cpu),
            ("CPUWeight", self.cpu_weight.map(|n| n.to_string())),
            ("IOWeight", self.io_weight.map(|n| n.to_string())),
            ("TasksMax", self.tasks_max.map(|n| n.to_string())),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", value?)))
        .collect()
    }
}

/// The longest name of a unit (`UNIT_NAME_MAX` in systemd's
/// `src/basic/unit-name.h`, without the byte that ends it).
const NAME_BYTES_MAX: usize = 255;

/// Whether a text may be the name of a unit of a kind, such as `.service`. It comes
/// from another host and becomes part of a path and an argument of commands, so it
/// is taken narrowly: what systemd allows, with nothing in front that reads as an
/// option or hides a file, and no template without its instance.
#[must_use]
pub fn is_unit_name(name: &str, kind: &str) -> bool {
    let Some(stem) = name.strip_suffix(kind) else {
        return false;
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b":_.-\\@".contains(&byte);
    name.len() <= NAME_BYTES_MAX
        && stem.bytes().all(plain)
        && !stem.starts_with(['-', '.', '@'])
        && !stem.is_empty()
        && !stem.ends_with('@')
        && stem.matches('@').count() <= 1
}

/// Whether a unit's name is that of one instance of a template.
#[must_use]
pub fn is_instance(name: &str) -> bool {
    name.contains('@')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_units_are_taken_narrowly() {
        for good in [
            "redis-server.service",
            "redis-server@one.service",
            "dev-disk\\x2dby.service",
            "a.b:c_d.service",
        ] {
            assert!(is_unit_name(good, ".service"), "{good}");
        }
        let long = format!("{}.service", "a".repeat(NAME_BYTES_MAX));
        for bad in [
            "",
            ".service",
            "redis-server",
            "redis-server.socket",
            "../x.service",
            "a/b.service",
            "-x.service",
            ".x.service",
            "redis@.service",
            "@x.service",
            "a@b@c.service",
            "a b.service",
            "a\n.service",
            "a$x.service",
            "a%i.service",
            "a*.service",
            "ä.service",
            &long,
        ] {
            assert!(!is_unit_name(bad, ".service"), "{bad}");
        }
        assert!(is_unit_name("system.slice", ".slice"));
        assert!(is_instance("a@b.service") && !is_instance("a.service"));
    }

    #[test]
    fn limits_of_a_cgroup_as_settings_of_a_unit() {
        let files = [
            ("memory.max", "268435456\n"),
            ("memory.high", "max\n"),
            ("cpu.max", "150000 100000\n"),
            ("cpu.weight", "100\n"),
            ("io.weight", "default 50\n8:0 70\n"),
            ("pids.max", "512\n"),
        ];
        let limits = Limits::read(|name| {
            let found = files.iter().find(|(file, _)| *file == name);
            found.map(|(_, text)| (*text).to_owned())
        });
        assert_eq!(
            limits.settings(),
            [
                "MemoryMax=268435456",
                "CPUQuota=150%",
                "IOWeight=50",
                "TasksMax=512"
            ]
        );
        assert_eq!(Limits::read(|_| None), Limits::default());
        let odd = Limits::read(|_| Some("12345 100000".to_owned()));
        assert!(odd.settings().contains(&"CPUQuota=12.34%".to_owned()));
        for odd in ["max 100000", "x", "", "1 0", "99999999999999999999 1"] {
            let limits = Limits::read(|_| Some(odd.to_owned()));
            assert_eq!(limits.cpu_permyriad, None, "{odd}");
        }
    }
}
