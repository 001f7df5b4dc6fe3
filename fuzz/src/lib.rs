//! What is done with each input, by the fuzzer and by the test that replays
//! the corpora. A target panics when what it has read is not what it would
//! write, or is out of bounds.

use migrate_core::journal::Record;
use migrate_core::stream::BatchHead;
use migrate_core::wire::{
    CONTROL_BYTES_MAX, FRAME_BODY_BYTES_MAX, FrameKind, ImagePiece, Message, PACKET_BYTES_MAX,
    PAGE_BYTES, PAGE_RUN_BYTES, PageRun, decode_header, encode_header,
};
use migrate_ebpf_common::{Direction, Layer2, Parsed, parse};

/// A frame's header and, by its kind, the body behind it; and the head of a
/// batch of pages.
pub fn frames(data: &[u8]) {
    let Some((&header, body)) = data.split_first_chunk::<8>() else {
        return;
    };
    if let Ok(head) = BatchHead::decode(header) {
        assert_eq!(head.encode(), Ok(header));
    }
    let Ok((kind, bytes)) = decode_header(header) else {
        return;
    };
    assert_eq!(encode_header(kind, bytes), Ok(header));
    let most = match kind {
        FrameKind::Control => CONTROL_BYTES_MAX,
        FrameKind::Pages | FrameKind::Image => FRAME_BODY_BYTES_MAX,
        FrameKind::Packet => PACKET_BYTES_MAX,
    };
    assert!(bytes <= most);
    match kind {
        FrameKind::Control | FrameKind::Packet => {}
        FrameKind::Pages => {
            if let Ok((run, pages)) = PageRun::decode(body) {
                assert_eq!(run.encode(), body[..PAGE_RUN_BYTES]);
                assert_eq!(run.data_bytes(), pages.len() as u64);
                let bytes = run.pages.checked_mul(PAGE_BYTES as u64);
                assert!(
                    bytes
                        .and_then(|bytes| run.vaddr.checked_add(bytes))
                        .is_some()
                );
            }
        }
        FrameKind::Image => {
            if let Ok(piece) = ImagePiece::decode(body) {
                assert!(!piece.name.contains('/') && !piece.name.starts_with('.'));
                let head = piece.encode_head().expect("a name that was accepted");
                assert_eq!([&head, piece.data].concat(), body);
            }
        }
    }
}

/// A control message.
pub fn messages(data: &[u8]) {
    if let Ok(message) = postcard::from_bytes::<Message>(data) {
        let bytes = postcard::to_stdvec(&message).expect("a message that was read");
        // Numbers may have been written longer than need be.
        assert!(bytes.len() <= data.len());
        assert_eq!(postcard::from_bytes(&bytes), Ok(message));
    }
}

/// One side's record of a migration.
pub fn journals(data: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<Record>(data) {
        let text = serde_json::to_vec(&record).expect("a record that was read");
        let again: Record = serde_json::from_slice(&text).expect("what was written");
        assert_eq!(record, again);
    }
}

/// A packet, as an interface shows it: two bytes of link layer protocol first.
pub fn packets(data: &[u8]) {
    let Some((&protocol, packet)) = data.split_first_chunk::<2>() else {
        return;
    };
    let ethertype = u16::from_be_bytes(protocol);
    for layer2 in [Layer2::Ethernet, Layer2::None] {
        let [came, leaves] = [Direction::Ingress, Direction::Egress]
            .map(|direction| parse(packet, layer2, ethertype, direction));
        // Which end is ours changes nothing about what a packet is.
        assert_eq!(
            std::mem::discriminant::<Parsed>(&came),
            std::mem::discriminant(&leaves)
        );
    }
}
