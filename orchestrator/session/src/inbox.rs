//! Messages and held packets of the other side, read by a task of their own,
//! so that waiting for one can be given up at any moment without tearing a
//! frame apart, and packets are taken in whatever is waited for.

use std::time::Duration;

use bytes::Bytes;
use migrate_channel::{ChannelError, Frame, Receiver};
use migrate_core::wire::{Adopted, Message};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::error::Error;

/// How long the destination may take to put a tree that runs into a unit: some runs of
/// `systemctl`, two of which may wait for 45 s.
const ADOPTED_LIMIT: Duration = Duration::from_secs(150);

/// The receiving half of a connection once only messages and packets come.
#[derive(Debug)]
pub(crate) struct Inbox {
    peer: String,
    frames: mpsc::Receiver<Result<Frame, ChannelError>>,
    packets: Vec<Bytes>,
    packet_bytes: usize,
    dropped_packets: u64,
    task: JoinHandle<()>,
}

impl Inbox {
    /// Held packets that are kept for the tree, in bytes; what comes beyond is
    /// dropped, and its sender sends it again. As much as a gate ever holds.
    const PACKET_BYTES_MAX: usize = crate::held::BYTES_CAP;

    /// What a packet takes beside its bytes: a peer could send empty ones.
    const PACKET_OVERHEAD_BYTES: usize = 64;

    /// Frames that may wait to be read; a peer that sends more is stopped by
    /// the connection's own flow control.
    const BACKLOG: usize = 16;

    /// Silence that no step of a migration is allowed to make. Every wait has
    /// a shorter limit of its own; this one ends the task.
    const SILENCE: Duration = Duration::from_secs(24 * 3600);

    pub(crate) fn new(peer: String, mut receiver: Receiver) -> Self {
        let (sender, frames) = mpsc::channel(Self::BACKLOG);
        let task = tokio::spawn(async move {
            loop {
                let frame = receiver.next(Self::SILENCE).await;
                let last = frame.is_err();
                if sender.send(frame).await.is_err() || last {
                    return;
                }
            }
        });
        Self {
            peer,
            frames,
            packets: Vec::new(),
            packet_bytes: 0,
            dropped_packets: 0,
            task,
        }
    }

    /// The next message; a [`Message::Failed`] or [`Message::Abort`] becomes an
    /// error. Packets that come before it are kept.
    pub(crate) async fn next(&mut self, awaited: &'static str) -> Result<Message, Error> {
        loop {
            match self.frames.recv().await {
                Some(Ok(Frame::Packet(packet))) => self.keep(packet),
                Some(Ok(Frame::Control(Message::Failed(error)))) => return Err(error.into()),
                Some(Ok(Frame::Control(Message::Abort { reason }))) => {
                    return Err(Error::Aborted(reason));
                }
                Some(Ok(Frame::Control(message))) => return Ok(message),
                Some(Ok(Frame::Pages { .. } | Frame::Image { .. })) => {
                    return Err(Error::Unexpected {
                        peer: self.peer.clone(),
                        got: "pages or an image".to_owned(),
                        awaited,
                    });
                }
                Some(Err(error)) => return Err(broken(&self.peer, error, awaited)),
                None => {
                    return Err(Error::PeerGone {
                        peer: self.peer.clone(),
                        awaited,
                    });
                }
            }
        }
    }

    fn keep(&mut self, packet: Bytes) {
        let bytes = packet.len() + Self::PACKET_OVERHEAD_BYTES;
        if self.packet_bytes + bytes > Self::PACKET_BYTES_MAX {
            self.dropped_packets += 1;
        } else {
            self.packet_bytes += bytes;
            self.packets.push(packet);
        }
    }

    /// The packets that have come so far, in order.
    pub(crate) fn take_packets(&mut self) -> Vec<Bytes> {
        self.packet_bytes = 0;
        std::mem::take(&mut self.packets)
    }

    /// Waits for packets; none once the other side has closed. Messages that
    /// come between them have no meaning any more.
    pub(crate) async fn packets(&mut self) -> Option<Vec<Bytes>> {
        while self.packets.is_empty() {
            match self.frames.recv().await? {
                Ok(Frame::Packet(packet)) => self.keep(packet),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
        Some(self.take_packets())
    }

    /// Packets for which there was no room.
    pub(crate) fn dropped_packets(&self) -> u64 {
        self.dropped_packets
    }

    /// As [`Inbox::next`], within a limit.
    pub(crate) async fn next_within(
        &mut self,
        awaited: &'static str,
        limit: Duration,
    ) -> Result<Message, Error> {
        match tokio::time::timeout(limit, self.next(awaited)).await {
            Ok(message) => message,
            Err(_) => Err(Error::PeerSilent {
                peer: self.peer.clone(),
                awaited,
                waited: limit,
            }),
        }
    }

    /// The word which unit has the tree; one about connections that nobody has waited
    /// for may come before it.
    pub(crate) async fn adopted(&mut self) -> Result<Adopted, Error> {
        const AWAITED: &str = "which unit has the tree";
        let mut told = self.next_within(AWAITED, ADOPTED_LIMIT).await?;
        if let Message::Seen(_) = told {
            told = self.next_within(AWAITED, ADOPTED_LIMIT).await?;
        }
        match told {
            Message::Adopted(adopted) => Ok(adopted),
            other => Err(self.unexpected(&other, AWAITED)),
        }
    }

    /// Waits until the other side has closed, within a limit.
    pub(crate) async fn closed(&mut self, limit: Duration) {
        let _ = tokio::time::timeout(limit, async {
            while let Some(Ok(_)) = self.frames.recv().await {}
        })
        .await;
    }

    /// Why the other side has gone, when it has said so: it may have closed the
    /// connection while this side was writing, with its reason still unread. `lost`
    /// otherwise, after `limit` at most.
    pub(crate) async fn reason_for(&mut self, lost: Error, limit: Duration) -> Error {
        let said = async {
            loop {
                match self.next("its reason").await {
                    Ok(_) => {}
                    Err(said @ (Error::Peer(_) | Error::Aborted(_))) => return Some(said),
                    Err(_) => return None,
                }
            }
        };
        match tokio::time::timeout(limit, said).await {
            Ok(Some(said)) => said,
            Ok(None) | Err(_) => lost,
        }
    }

    /// See [`unexpected`].
    pub(crate) fn unexpected(&self, message: &Message, awaited: &'static str) -> Error {
        unexpected(&self.peer, message, awaited)
    }
}

/// The error for a connection on which no more frames come.
pub(crate) fn broken(peer: &str, error: ChannelError, awaited: &'static str) -> Error {
    let peer = peer.to_owned();
    if error.is_disconnect() {
        Error::PeerGone { peer, awaited }
    } else {
        Error::Channel {
            peer,
            source: error,
        }
    }
}

/// The error for a message that has no meaning at this point.
pub(crate) fn unexpected(peer: &str, message: &Message, awaited: &'static str) -> Error {
    let text = format!("{message:?}");
    let got = text
        .split(|c: char| !c.is_alphanumeric())
        .next()
        .unwrap_or("something")
        .to_owned();
    Error::Unexpected {
        peer: peer.to_owned(),
        got,
        awaited,
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.task.abort();
    }
}
