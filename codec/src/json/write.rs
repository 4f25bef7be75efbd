//! Writes JSON strings, numbers and string maps, with the escapes that Dynamo's writer uses.

/// Hands out `text` in escaped pieces: `\" \\ \b \f \n \r \t`, other controls as `\u00xx`, the
/// rest as it is.
pub(crate) fn escape(text: &str, emit: &mut dyn FnMut(&str)) {
    let mut start = 0;
    for (at, byte) in text.bytes().enumerate() {
        let mut hex = *b"\\u00__";
        let escaped = match byte {
            b'"' => "\\\"",
            b'\\' => "\\\\",
            0x08 => "\\b",
            0x0c => "\\f",
            b'\n' => "\\n",
            b'\r' => "\\r",
            b'\t' => "\\t",
            0..0x20 => {
                hex[4] = b'0' + (byte >> 4);
                hex[5] = b"0123456789abcdef"[usize::from(byte & 15)];
                // Six ASCII bytes.
                std::str::from_utf8(&hex).unwrap_or_default()
            }
            _ => continue,
        };
        emit(&text[start..at]);
        emit(escaped);
        start = at + 1;
    }
    emit(&text[start..]);
}

/// Appends `text` as a JSON string, quotes included.
pub fn write_string(text: &str, out: &mut Vec<u8>) {
    out.push(b'"');
    escape(text, &mut |piece| out.extend_from_slice(piece.as_bytes()));
    out.push(b'"');
}

/// Writes `number` in decimal to the end of `digits` and answers that part.
#[must_use]
pub fn decimal(mut number: u64, digits: &mut [u8; 20]) -> &str {
    let mut at = digits.len();
    loop {
        at -= 1;
        // A digit fits a byte.
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            // Only ASCII digits were written.
            return std::str::from_utf8(&digits[at..]).unwrap_or_default();
        }
    }
}

pub(crate) fn write_u64(number: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(decimal(number, &mut [0; 20]).as_bytes());
}

/// Appends a JSON object of strings, member by member, without blanks.
#[derive(Debug)]
pub struct MapWriter<'a> {
    out: &'a mut Vec<u8>,
    first: bool,
}

impl<'a> MapWriter<'a> {
    /// Opens the object.
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        out.push(b'{');
        Self { out, first: true }
    }

    /// Appends one member. Names must differ; this is not checked.
    pub fn member(&mut self, key: &str, value: &str) -> &mut Self {
        if !std::mem::take(&mut self.first) {
            self.out.push(b',');
        }
        write_string(key, self.out);
        self.out.push(b':');
        write_string(value, self.out);
        self
    }

    /// Closes the object.
    pub fn finish(self) {
        self.out.push(b'}');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_as_dynamo_does() {
        let mut out = vec![];
        let text = "quote\" backslash\\ newline\n tab\t nul\0 unit\u{1f} del\u{7f} snow☃ /";
        write_string(text, &mut out);
        assert_eq!(out, serde_json::to_vec(text).unwrap());
        out.clear();
        let mut map = MapWriter::new(&mut out);
        map.member("a", "1").member("b\"", "");
        map.finish();
        assert_eq!(out, br#"{"a":"1","b\"":""}"#);
    }

    #[test]
    fn decimals() {
        for number in [0, 9, 10, 1_000_000_007, u64::MAX] {
            assert_eq!(decimal(number, &mut [0; 20]), number.to_string());
        }
    }
}
