//! JSON-RPC 1.0 as the database and the daemons of Open vSwitch speak it: objects one after the other, with nothing
//! between them. Sans-IO.
//!
//! Source: RFC 7047, section 4; `unixctl(7)` of Open vSwitch.

use serde_json::{Value, json};

/// Bytes of one message; the answers that are asked for are far shorter.
const MESSAGE_LEN_MAX: usize = 16 << 20;

/// What the other side said.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// It wants an answer with this id. Only `echo` is asked of clients.
    Request {
        /// To be given back.
        id: Value,
        /// What it wants.
        method: String,
        /// With what.
        params: Value,
    },
    /// It wants nothing.
    Notification {
        /// What it tells.
        method: String,
    },
    /// An answer; the error is whatever the other side put there.
    Answer {
        /// Of the request.
        id: Value,
        /// Result or error.
        result: Result<Value, Value>,
    },
}

/// Why bytes are no message; the connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum JsonRpcError {
    /// Not JSON, or not an object.
    #[error("no JSON-RPC: {0}")]
    Invalid(#[from] serde_json::Error),
    /// Neither request nor answer.
    #[error("a JSON object that is neither request nor answer")]
    Shape,
    /// More than is kept.
    #[error("a message of more than {MESSAGE_LEN_MAX} bytes")]
    TooLong,
}

/// The bytes of a request.
#[must_use]
pub fn request(id: u64, method: &str, params: &Value) -> Vec<u8> {
    json!({ "id": id, "method": method, "params": params }).to_string().into_bytes()
}

/// The bytes of an answer.
#[must_use]
pub fn answer(id: &Value, result: &Value) -> Vec<u8> {
    json!({ "id": id, "result": result, "error": null }).to_string().into_bytes()
}

/// Cuts a stream of bytes into messages; work is linear in the bytes, however they are cut.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of `buffer` that were looked at.
    seen: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Decoder {
    /// Takes what was received.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message.
    ///
    /// # Errors
    /// [`JsonRpcError`]; the decoder is not to be used any more.
    pub fn next_message(&mut self) -> Result<Option<Message>, JsonRpcError> {
        while let Some(&byte) = self.buffer.get(self.seen) {
            self.seen += 1;
            if self.closes(byte) {
                let value = serde_json::from_slice(&self.buffer[..self.seen])?;
                self.buffer.drain(..self.seen);
                self.seen = 0;
                return message(value).map(Some);
            }
        }
        if self.buffer.len() > MESSAGE_LEN_MAX { Err(JsonRpcError::TooLong) } else { Ok(None) }
    }

    /// Whether an object ends with this byte. What is outside of objects is left to the parser to refuse.
    fn closes(&mut self, byte: u8) -> bool {
        if self.in_string {
            let escaped = std::mem::take(&mut self.escaped);
            match byte {
                b'\\' if !escaped => self.escaped = true,
                b'"' if !escaped => self.in_string = false,
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => {
                self.depth = self.depth.saturating_sub(1);
                return self.depth == 0;
            }
            _ => {}
        }
        false
    }
}

fn message(value: Value) -> Result<Message, JsonRpcError> {
    let Value::Object(mut fields) = value else { return Err(JsonRpcError::Shape) };
    let mut take = |key: &str| fields.remove(key).unwrap_or_default();
    let id = take("id");
    if let Value::String(method) = take("method") {
        let params = take("params");
        let notification = id.is_null();
        return Ok(if notification {
            Message::Notification { method }
        } else {
            Message::Request { id, method, params }
        });
    }
    if id.is_null() {
        return Err(JsonRpcError::Shape);
    }
    let error = take("error");
    let result = if error.is_null() { Ok(take("result")) } else { Err(error) };
    Ok(Message::Answer { id, result })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(decoder: &mut Decoder) -> Vec<Message> {
        std::iter::from_fn(|| decoder.next_message().unwrap()).collect()
    }

    #[test]
    fn requests_answers_errors_and_notifications_are_told_apart() {
        let mut decoder = Decoder::default();
        decoder.push(&request(1, "echo", &json!([])));
        decoder.push(&answer(&json!(1), &json!(["}{"])));
        decoder.push(
            br#"{"id":2,"result":null,"error":"no such command"} {"id":null,"method":"update","params":[]}"#,
        );
        let answered = |id, result| Message::Answer { id: json!(id), result };
        assert_eq!(
            all(&mut decoder),
            [
                Message::Request { id: json!(1), method: "echo".into(), params: json!([]) },
                answered(1, Ok(json!(["}{"]))),
                answered(2, Err(json!("no such command"))),
                Message::Notification { method: "update".into() },
            ]
        );
    }

    #[test]
    fn what_is_neither_request_nor_answer_is_refused() {
        for wrong in ["[]", "{}", "}", r#"{"id":null,"result":1}"#, "x{}"] {
            let mut decoder = Decoder::default();
            decoder.push(wrong.as_bytes());
            assert!(decoder.next_message().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_stream_is_cut_the_same_wherever_it_was_split(
            texts in proptest::collection::vec(".{0,20}", 1..6), splits in proptest::collection::vec(0usize..200, 0..8),
        ) {
            let stream: Vec<u8> = texts.iter().flat_map(|text| answer(&json!(text), &json!({ text: [text] }))).collect();
            let mut cuts: Vec<_> = splits.into_iter().map(|at| at % (stream.len() + 1)).collect();
            cuts.sort_unstable();
            let (mut decoder, mut messages, mut from) = (Decoder::default(), Vec::new(), 0);
            for to in cuts.into_iter().chain([stream.len()]) {
                decoder.push(&stream[from..to]);
                messages.extend(all(&mut decoder));
                from = to;
            }
            prop_assert_eq!(messages.len(), texts.len());
        }

        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_message() {}
        }
    }
}
