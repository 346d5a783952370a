//! What processes write to each other: frames of a kind, a tag and bytes.

use std::io::{self, Read, Write};

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bytes for whoever waits under the tag.
    Data = 1,
    /// The sender lives.
    Alive = 2,
    /// The sender ends its run with an error: the bytes say which.
    GiveUp = 3,
    /// The sender has ended its run.
    Bye = 4,
    /// The meeting: a document.
    Hello = 5,
}

/// The begin of every frame: what does not speak this language is recognised by its first bytes.
const MAGIC: [u8; 3] = *b"pcl";
/// Magic, kind, tag, length.
const HEADER: usize = 3 + 1 + 8 + 8;

/// A frame that came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub kind: Kind,
    pub tag: u64,
    pub bytes: Vec<u8>,
}

/// Writes a frame.
pub(super) fn write(to: &mut impl Write, kind: Kind, tag: u64, bytes: &[u8]) -> io::Result<()> {
    let mut header = [0; HEADER];
    header[..3].copy_from_slice(&MAGIC);
    header[3] = kind as u8;
    header[4..12].copy_from_slice(&tag.to_le_bytes());
    header[12..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    to.write_all(&header)?;
    to.write_all(bytes)
}

/// Reads a frame of at most `most` bytes. What is longer, or no frame, is [`io::ErrorKind::InvalidData`].
pub(super) fn read(from: &mut impl Read, most: u64) -> io::Result<Frame> {
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let kind = match header[3] {
        1 => Kind::Data,
        2 => Kind::Alive,
        3 => Kind::GiveUp,
        4 => Kind::Bye,
        5 => Kind::Hello,
        _ => return Err(no_frame()),
    };
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| header[at + n]));
    let (tag, length) = (word(4), word(12));
    if header[..3] != MAGIC || length > most {
        return Err(no_frame());
    }
    // Beyond this, room is made as bytes come, so that a wrong length costs no memory.
    let mut bytes = Vec::with_capacity(length.min(16 << 20) as usize);
    let read = from.take(length).read_to_end(&mut bytes)?;
    if (read as u64) < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Frame { kind, tag, bytes })
}

fn no_frame() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it does not speak paceline's language")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_lead_back() {
        let mut line = Vec::new();
        write(&mut line, Kind::Data, 7 << 40, b"abc").unwrap();
        write(&mut line, Kind::Bye, 0, b"").unwrap();
        let mut from = &line[..];
        assert_eq!(read(&mut from, 3).unwrap(), Frame { kind: Kind::Data, tag: 7 << 40, bytes: b"abc".to_vec() });
        assert_eq!(read(&mut from, 3).unwrap(), Frame { kind: Kind::Bye, tag: 0, bytes: vec![] });
        assert_eq!(read(&mut from, 3).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_is_no_frame_is_refused_without_making_room_for_it() {
        let mut line = Vec::new();
        write(&mut line, Kind::Data, 1, &[0; 100]).unwrap();
        assert_eq!(read(&mut &line[..], 99).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(read(&mut &line[..50], 100).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        line[12..20].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(read(&mut &line[..], u64::MAX).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let stranger = b"GET / HTTP/1.1\r\nHost: somewhere\r\n";
        assert_eq!(read(&mut &stranger[..], 1 << 20).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
