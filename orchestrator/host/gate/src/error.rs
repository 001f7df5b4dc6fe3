use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::FrameError;

/// Why the gate could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GateError {
    /// The id would not make a file name.
    #[error("`{id}` cannot name a gate: 1 to 64 characters of a-z, 0-9 and -")]
    BadId {
        /// The id as given.
        id: String,
    },
    /// No interface was given, or loopback only.
    #[error("there is no interface to put the gate on")]
    NoInterface,
    /// The gate has not been tried on so old a kernel.
    #[error("kernel {release} is too old for the gate")]
    KernelTooOld {
        /// The running kernel.
        release: String,
    },
    /// An interface index that the kernel does not know here.
    #[error("could not look up interface {index}")]
    Interface {
        /// The interface index.
        index: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the programs or their maps.
    #[error("could not load the gate into the kernel")]
    Load(#[source] Box<dyn Error + Send + Sync>),
    /// The kernel refused to attach a program.
    #[error("could not attach the gate to {interface}")]
    Attach {
        /// The interface's name.
        interface: String,
        /// The cause.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// No file system for pins.
    #[error("could not mount a bpf file system on {}", path.display())]
    MountBpffs {
        /// The mount point.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A gate of this id and role is there already.
    #[error("there is a gate already at {}", path.display())]
    AlreadyAttached {
        /// Its pins.
        path: PathBuf,
    },
    /// No gate of this id and role.
    #[error("there is no gate at {}", path.display())]
    NotFound {
        /// Where its pins would be.
        path: PathBuf,
    },
    /// A pin could not be made.
    #[error("could not pin the gate at {}", path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A pin could not be opened or read.
    #[error("could not open the pinned gate at {}", path.display())]
    OpenPin {
        /// The pin.
        path: PathBuf,
        /// The cause.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A pin or its directory could not be removed.
    #[error("could not remove {}", path.display())]
    Remove {
        /// The pin.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Pinned by another version of the program.
    #[error("the gate at {} has layout {found}, this program knows {known}", path.display())]
    Layout {
        /// Its pins.
        path: PathBuf,
        /// The layout version found.
        found: u64,
        /// The layout version of this program.
        known: u64,
    },
    /// Another process answers for the gate, and lives.
    #[error("the gate at {} belongs to process {pid}, which runs", path.display())]
    Owned {
        /// Its pins.
        path: PathBuf,
        /// The owner.
        pid: u32,
    },
    /// A map is full.
    #[error("{asked} more {table} do not fit, the gate was made for {capacity}")]
    Full {
        /// Which map.
        table: &'static str,
        /// Its size in keys.
        capacity: u32,
        /// The keys of the refused call.
        asked: usize,
    },
    /// A map could not be read or written.
    #[error("could not {attempt} the gate's {table}")]
    Map {
        /// Read, change.
        attempt: &'static str,
        /// Which map.
        table: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The gate drops, so there is nothing to take and no way back.
    #[error("the gate holds no packets: {reason}")]
    NoHold {
        /// Why not.
        reason: String,
    },
    /// Somebody has the held packets already.
    #[error("the gate's held packets have been taken already")]
    HeldTaken,
    /// Packets of this interface are not held, so none can go back to it.
    #[error("the gate does not hold packets of interface {index}")]
    NotHeld {
        /// The interface index.
        index: u32,
    },
    /// A frame that the kernel is not given.
    #[error("refused a held frame")]
    BadFrame(#[source] FrameError),
    /// A frame of a flow that this gate does not know.
    #[error("refused a held frame of a connection that is not the workload's")]
    ForeignFrame,
    /// The kernel did not take a frame back.
    #[error("could not give a held frame back to interface {index}")]
    GiveBack {
        /// The interface index.
        index: u32,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The lease ran out while the gate was closed or being closed: it has
    /// opened by itself, and packets may have passed.
    #[error("the gate's lease ran out {} ms ago and it has opened by itself", ago.as_millis())]
    LeaseExpired {
        /// How long ago.
        ago: Duration,
    },
}

impl GateError {
    /// The way out, where there is one.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Load(source) | Self::Attach { source, .. } if denied(source.as_ref()) => Some(
                "the gate needs root, or CAP_BPF and CAP_NET_ADMIN in the initial user namespace"
                    .to_owned(),
            ),
            Self::KernelTooOld { .. } => Some("the gate needs Linux 6.1 or newer".to_owned()),
            Self::MountBpffs { path, .. } => Some(format!(
                "run as root, or mount one beforehand: mount -t bpf bpf {}",
                path.display()
            )),
            Self::AlreadyAttached { .. } | Self::Layout { .. } => Some(
                "`migrate unlock` removes the gate of a migration that no longer runs".to_owned(),
            ),
            Self::Owned { pid, .. } => Some(format!(
                "let process {pid} finish, or end it and run `migrate unlock`"
            )),
            Self::Full { .. } => {
                Some("attach the gate again with a higher flow capacity".to_owned())
            }
            Self::LeaseExpired { .. } => {
                Some("roll back: the peers may have been answered meanwhile".to_owned())
            }
            Self::NoInterface => Some(
                "connections over loopback cannot leave their host; check the workload's address"
                    .to_owned(),
            ),
            Self::NotHeld { .. } => {
                Some("attach the gate to the interface that the frames are for".to_owned())
            }
            Self::ForeignFrame => {
                Some("add the flow to the gate before giving its frames back".to_owned())
            }
            Self::NoHold { .. }
            | Self::HeldTaken
            | Self::BadFrame(_)
            | Self::GiveBack { .. }
            | Self::BadId { .. }
            | Self::Interface { .. }
            | Self::Load(_)
            | Self::Attach { .. }
            | Self::NotFound { .. }
            | Self::Pin { .. }
            | Self::OpenPin { .. }
            | Self::Remove { .. }
            | Self::Map { .. } => None,
        }
    }
}

/// Whether a permission stands at the bottom of the chain.
fn denied(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::PermissionDenied
        {
            return true;
        }
        next = error.source();
    }
    false
}
