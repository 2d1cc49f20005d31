//! Varints and byte planes: what columns are made of.

/// Appends a number as LEB128: seven bits a byte, low ones first.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u128) {
    while value >= 0x80 {
        #[expect(clippy::cast_possible_truncation, reason = "the low seven bits")]
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    #[expect(clippy::cast_possible_truncation, reason = "below 128")]
    out.push(value as u8);
}

/// Appends the wrapping difference `to - from`, small ones of either sign in few bytes (zigzag).
pub(crate) fn put_signed(out: &mut Vec<u8>, from: u128, to: u128) {
    let difference = to.wrapping_sub(from).cast_signed();
    put_varint(out, (difference << 1 ^ difference >> 127).cast_unsigned());
}

/// Appends 16-bit values as all high bytes, then all low bytes: the high ones compress.
pub(crate) fn split_planes(out: &mut Vec<u8>, values: impl Iterator<Item = u16>) {
    let start = out.len();
    let mut low = Vec::new();
    for value in values {
        let [high, low_byte] = value.to_be_bytes();
        out.push(high);
        low.push(low_byte);
    }
    debug_assert_eq!(out.len() - start, low.len());
    out.append(&mut low);
}

/// Reads what the functions above wrote; `None` at the first byte that they cannot have written.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn varint(&mut self) -> Option<u128> {
        let mut value = 0u128;
        for (i, &byte) in self.rest.iter().enumerate().take(19) {
            let bits = u128::from(byte & 0x7f);
            let shifted = bits << (7 * i);
            if shifted >> (7 * i) != bits {
                return None;
            }
            value |= shifted;
            if byte < 0x80 {
                self.rest = &self.rest[i + 1..];
                return Some(value);
            }
        }
        None
    }

    pub(crate) fn signed(&mut self, from: u128) -> Option<u128> {
        let zigzag = self.varint()?;
        let difference = (zigzag >> 1).cast_signed() ^ -(zigzag & 1).cast_signed();
        Some(from.wrapping_add(difference.cast_unsigned()))
    }

    /// A column: its length, then that many bytes.
    pub(crate) fn column(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.varint()?).ok()?;
        let (column, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_lead_back(values: Vec<(u128, u128)>) {
            let mut bytes = Vec::new();
            for &(from, to) in &values {
                put_varint(&mut bytes, from);
                put_signed(&mut bytes, from, to);
            }
            let mut reader = Reader::new(&bytes);
            for &(from, to) in &values {
                prop_assert_eq!(reader.varint(), Some(from));
                prop_assert_eq!(reader.signed(from), Some(to));
            }
            prop_assert!(reader.is_empty());
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let mut reader = Reader::new(&bytes);
            while reader.varint().is_some() {}
            let _ = Reader::new(&bytes).column();
        }
    }
}
