//! What a process has been given by one kernel and needs of another: the vDSO,
//! and restartable sequences.
//!
//! Both are set up once, as a program starts, by what its kernel offers then.
//! CRIU brings them to another kernel as they are, so that one has to take them.

use serde::{Deserialize, Serialize};

use crate::facts::HostFacts;
use crate::preflight::Finding;

/// What a kernel takes where a thread registers for rseq(2): CRIU does it for
/// the copy with the address and the length that the thread has used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rseq {
    /// Nothing: it was built without `CONFIG_RSEQ`.
    Missing,
    /// [`Rseq::ORIGINAL_BYTES`] and nothing else, as before Linux 6.3.
    Original,
    /// Those, or at least as many as its own fields take.
    Extensible {
        /// `AT_RSEQ_FEATURE_SIZE`: the end of the last field.
        feature_bytes: u32,
        /// `AT_RSEQ_ALIGN`: what the address of a longer area has to be a
        /// multiple of.
        align_bytes: u32,
    },
}

impl Rseq {
    /// The length of the area, and its alignment, in the first version.
    pub const ORIGINAL_BYTES: u32 = 32;

    /// Whether a thread can register this area. Linux kernel/rseq.c, `rseq()`.
    #[must_use]
    pub fn takes(self, address: u64, bytes: u32) -> bool {
        let aligned = |to: u32| to != 0 && address.is_multiple_of(u64::from(to));
        match self {
            Self::Missing => false,
            Self::Original => bytes == Self::ORIGINAL_BYTES && aligned(Self::ORIGINAL_BYTES),
            Self::Extensible { .. } if bytes == Self::ORIGINAL_BYTES => {
                aligned(Self::ORIGINAL_BYTES)
            }
            Self::Extensible {
                feature_bytes,
                align_bytes,
            } => bytes >= feature_bytes && aligned(align_bytes),
        }
    }

    /// The length that a C library registers on this kernel: glibc takes the
    /// original one unless the kernel's fields need more.
    fn registered_bytes(self) -> Option<u32> {
        match self {
            Self::Missing => None,
            Self::Original => Some(Self::ORIGINAL_BYTES),
            Self::Extensible {
                feature_bytes,
                align_bytes,
            } => Some(if feature_bytes <= Self::ORIGINAL_BYTES {
                Self::ORIGINAL_BYTES
            } else {
                feature_bytes.next_multiple_of(align_bytes.max(1))
            }),
        }
    }

    /// Where fields end that the kernel keeps up to date, by the first version
    /// `flags`, which is the last one of it.
    fn kept_bytes(self) -> u32 {
        const ORIGINAL_FIELDS_BYTES: u32 = 20;
        match self {
            Self::Missing => 0,
            Self::Original => ORIGINAL_FIELDS_BYTES,
            Self::Extensible { feature_bytes, .. } => feature_bytes,
        }
    }

    fn what_it_takes(self) -> String {
        let original = Self::ORIGINAL_BYTES;
        match self {
            Self::Missing => "was built without CONFIG_RSEQ".to_owned(),
            Self::Original => format!("takes {original} bytes and no more"),
            Self::Extensible {
                feature_bytes,
                align_bytes,
            } => format!(
                "takes {original} bytes, or {feature_bytes} and more at a multiple of {align_bytes}"
            ),
        }
    }
}

const OTHER_KERNEL: &str =
    "boot a kernel of the same or a newer version, as its distribution builds it";

/// Functions of the vDSO that CRIU redirects to the new kernel's, the lists of
/// `criu/arch/*/include/asm/vdso.h` in CRIU 4.2, of other machines none. Where
/// the copy's vDSO has one and the new kernel's has not, it is redirected to
/// nowhere.
fn redirected(machine: &str) -> &'static [&'static str] {
    match machine {
        "x86_64" => &[
            "__vdso_clock_gettime",
            "__vdso_getcpu",
            "__vdso_gettimeofday",
            "__vdso_time",
        ],
        "aarch64" => &[
            "__kernel_clock_getres",
            "__kernel_clock_gettime",
            "__kernel_gettimeofday",
            "__kernel_rt_sigreturn",
        ],
        _ => &[],
    }
}

/// Whether what runs on one kernel can go on on the other, as far as its own
/// memory goes. What is not known of one of them is not judged.
#[must_use]
pub fn compare(source: &HostFacts, destination: &HostFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(compare_vdso(source, destination));
    findings.extend(compare_rseq(source, destination));
    findings
}

fn compare_vdso(source: &HostFacts, destination: &HostFacts) -> Option<Finding> {
    const SUBJECT: &str = "vDSO";
    let (there, here) = (source.vdso.as_ref()?, destination.vdso.as_ref()?);
    if there.is_empty() {
        return None;
    }
    // CRIU criu/pie/parasite-vdso.c, `vdso_proxify()`: it gives up.
    if here.is_empty() {
        return Some(Finding::refused(
            SUBJECT,
            "the kernel of the destination gives programs none, and those of the tree have one",
            "take `vdso=0` from that kernel's command line, or boot one that was built with it",
        ));
    }
    let missing: Vec<&str> = redirected(&destination.machine)
        .iter()
        .copied()
        .filter(|name| {
            let has = |names: &[String]| names.iter().any(|has| has == name);
            has(there) && !has(here)
        })
        .collect();
    Some(if missing.is_empty() {
        Finding::ok(SUBJECT, "has what the tree's is redirected to")
    } else {
        Finding::refused(
            SUBJECT,
            format!(
                "the kernel of the destination lacks {}, which the tree may call at any time",
                missing.join(", ")
            ),
            OTHER_KERNEL,
        )
    })
}

/// By what the kernels offer. Which threads have registered, and what, is only
/// known when they stand still ([`refused_areas`]).
fn compare_rseq(source: &HostFacts, destination: &HostFacts) -> Option<Finding> {
    const SUBJECT: &str = "rseq";
    let (there, here) = (source.rseq?, destination.rseq?);
    let bytes = there.registered_bytes()?;
    if !here.takes(0, bytes) {
        return Some(Finding::note(
            SUBJECT,
            format!(
                "programs of glibc 2.35 and newer may have registered {bytes} bytes a thread, and the \
                 kernel of the destination {}: if so, the restore fails and is undone",
                here.what_it_takes()
            ),
            OTHER_KERNEL,
        ));
    }
    (here.kept_bytes() < there.kept_bytes()).then(|| {
        Finding::note(
            SUBJECT,
            "the kernel of the destination does not keep all fields up to date that the source's \
             does",
            "matters only to programs that use them, by librseq or an allocator per CPU; glibc does \
             not",
        )
    })
}

/// Of areas that threads have registered, addresses and lengths, those that
/// the kernel of this host does not take.
#[must_use]
pub fn refused_areas(host: &HostFacts, areas: &[(u64, u32)]) -> Option<Finding> {
    let here = host.rseq?;
    let refused: Vec<u32> = areas
        .iter()
        .filter(|(address, bytes)| !here.takes(*address, *bytes))
        .map(|(_, bytes)| *bytes)
        .collect();
    let largest = refused.iter().max()?;
    Some(Finding::refused(
        "rseq",
        format!(
            "{} of {} threads have registered up to {largest} bytes, and the kernel {}",
            refused.len(),
            areas.len(),
            here.what_it_takes()
        ),
        OTHER_KERNEL,
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::preflight::Severity;

    /// Linux 6.3 to 6.18, on x86.
    const V6_12: Rseq = Rseq::Extensible {
        feature_bytes: 28,
        align_bytes: 32,
    };
    /// With fields beyond the original length.
    const LONGER: Rseq = Rseq::Extensible {
        feature_bytes: 33,
        align_bytes: 64,
    };

    fn host(rseq: Option<Rseq>, vdso: Option<&[&str]>) -> HostFacts {
        HostFacts {
            hostname: "h".into(),
            kernel: "6.12".into(),
            machine: "x86_64".into(),
            cpu_flags: Vec::new(),
            criu: None,
            memory_available_bytes: 0,
            image_space_bytes: 0,
            swaps_to: Vec::new(),
            missing_capabilities: Vec::new(),
            rseq,
            vdso: vdso.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
        }
    }

    fn severities(source: &HostFacts, destination: &HostFacts) -> Vec<(String, Severity)> {
        compare(source, destination)
            .into_iter()
            .map(|finding| (finding.subject, finding.severity))
            .collect()
    }

    #[test]
    fn what_kernels_take_of_rseq() {
        for (rseq, address, bytes, takes) in [
            (Rseq::Missing, 0x7000, 32, false),
            (Rseq::Original, 0x7000, 32, true),
            (Rseq::Original, 0x7010, 32, false),
            (Rseq::Original, 0x7000, 64, false),
            (V6_12, 0x7000, 32, true),
            (V6_12, 0x7010, 32, false),
            (V6_12, 0x7020, 64, true),
            (LONGER, 0x7020, 32, true),
            (LONGER, 0x7020, 64, false),
            (LONGER, 0x7040, 64, true),
            (LONGER, 0x7040, 30, false),
        ] {
            assert_eq!(
                rseq.takes(address, bytes),
                takes,
                "{rseq:?} {address:#x} {bytes}"
            );
        }
    }

    #[test]
    fn rseq_is_refused_only_where_threads_are_known_to_have_registered() {
        let severity = |source, destination| {
            let findings = severities(&host(source, None), &host(destination, None));
            findings.first().map(|(_, severity)| *severity)
        };
        let note = Some(Severity::Note);
        for (source, destination, expected) in [
            (Some(V6_12), Some(V6_12), None),
            (Some(Rseq::Original), Some(V6_12), None),
            (Some(V6_12), Some(Rseq::Original), note),
            (Some(V6_12), Some(Rseq::Missing), note),
            (Some(LONGER), Some(Rseq::Original), note),
            (Some(LONGER), Some(V6_12), note),
            (Some(V6_12), Some(LONGER), None),
            (Some(Rseq::Missing), Some(Rseq::Missing), None),
            (Some(V6_12), None, None),
            (None, Some(Rseq::Missing), None),
        ] {
            assert_eq!(
                severity(source, destination),
                expected,
                "{source:?} {destination:?}"
            );
        }
        let areas = [(0x7000, 32), (0x7040, 64)];
        let told = |rseq| refused_areas(&host(rseq, None), &areas);
        let finding = told(Some(Rseq::Original)).unwrap();
        assert_eq!(finding.severity, Severity::Refused);
        assert!(finding.finding.contains("1 of 2 threads"), "{finding:?}");
        assert!(finding.finding.contains("64 bytes"), "{finding:?}");
        assert!(!finding.way_out.is_empty());
        let finding = told(Some(Rseq::Missing)).unwrap();
        assert!(finding.finding.contains("CONFIG_RSEQ"), "{finding:?}");
        assert_eq!(told(Some(V6_12)), None);
        assert_eq!(told(None), None);
        assert_eq!(refused_areas(&host(Some(Rseq::Missing), None), &[]), None);
    }

    #[test]
    fn a_vdso_needs_what_criu_redirects_to() {
        let all = redirected("x86_64");
        let more = [all, &["__vdso_getrandom"]].concat();
        let severity = |source, destination| {
            let findings = severities(&host(None, source), &host(None, destination));
            findings.first().map(|(_, severity)| *severity)
        };
        for (source, destination, expected) in [
            (Some(all), Some(all), Some(Severity::Ok)),
            (Some(&more[..]), Some(all), Some(Severity::Ok)),
            (Some(all), Some(&all[1..]), Some(Severity::Refused)),
            (Some(&all[1..]), Some(all), Some(Severity::Ok)),
            (Some(all), Some(&[][..]), Some(Severity::Refused)),
            (Some(&[][..]), Some(&[][..]), None),
            (Some(all), None, None),
            (None, Some(&[][..]), None),
        ] {
            assert_eq!(
                severity(source, destination),
                expected,
                "{source:?} {destination:?}"
            );
        }
    }

    fn any_rseq() -> impl Strategy<Value = Rseq> {
        prop_oneof![
            Just(Rseq::Missing),
            Just(Rseq::Original),
            (20_u32..200, 5_u32..9).prop_map(|(feature_bytes, shift)| Rseq::Extensible {
                feature_bytes,
                align_bytes: 1 << shift,
            }),
        ]
    }

    proptest! {
        #[test]
        fn a_kernel_takes_what_was_registered_on_it(rseq in any_rseq()) {
            if let Some(bytes) = rseq.registered_bytes() {
                prop_assert!(rseq.takes(0x1_0000, bytes));
            }
            // So nothing is said of a host and its like.
            let same = host(Some(rseq), Some(redirected("x86_64")));
            let findings = compare(&same, &same);
            prop_assert!(findings.iter().all(|f| f.severity == Severity::Ok), "{:?}", findings);
        }

        #[test]
        fn no_comparison_by_kernels_alone_refuses_for_rseq(a in any_rseq(), b in any_rseq()) {
            let findings = compare(&host(Some(a), None), &host(Some(b), None));
            prop_assert!(!crate::preflight::refused(&findings), "{:?}", findings);
        }
    }
}
