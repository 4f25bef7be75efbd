//! Items of a reply as values, wherever the reply is read.

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::error::DynamoError;
use corelane_codec::item::{Annotated, from_bytes};
use serde::de::{DeserializeOwned, IgnoredAny};

/// An item beyond this cannot be an error: their texts are bounded.
const ERROR_BYTES_MAX: usize = 64 * 1024;

/// A reply that is read item by item.
pub(super) trait Items {
    /// How its items are encoded.
    fn codec(&self) -> PayloadCodec;

    /// The next item as it came.
    async fn next_item(&mut self) -> Option<Result<Vec<u8>, DynamoError>>;
}

/// The next item as a value; an error item as `Err`.
pub(super) async fn next<T: DeserializeOwned>(
    reply: &mut impl Items,
) -> Option<Result<Annotated<T>, DynamoError>> {
    let item = reply.next_item().await?;
    Some(item.and_then(|item| typed(&item, reply.codec())))
}

/// The data of the next item that has any.
pub(super) async fn next_data<T: DeserializeOwned>(
    reply: &mut impl Items,
) -> Option<Result<T, DynamoError>> {
    loop {
        match next::<T>(reply).await? {
            Ok(item) => match item.data {
                Some(data) => return Some(Ok(data)),
                None => continue,
            },
            Err(error) => return Some(Err(error)),
        }
    }
}

/// The error that an item is, if it is one.
pub(super) fn error_of(item: &[u8], codec: PayloadCodec) -> Option<DynamoError> {
    let word = b"error";
    let short = item.len() <= ERROR_BYTES_MAX;
    if !short || !item.windows(word.len()).any(|window| window == word) {
        return None;
    }
    let item: Annotated<IgnoredAny> = from_bytes(item, codec).ok()?;
    item.to_error()
}

/// An item as a value; an error item as `Err`.
fn typed<T: DeserializeOwned>(
    item: &[u8],
    codec: PayloadCodec,
) -> Result<Annotated<T>, DynamoError> {
    let parsed: Annotated<T> = from_bytes(item, codec).map_err(|why| {
        let text = format!("an item is not what was expected: {why}");
        DynamoError::backend_protocol(text)
    })?;
    match parsed.to_error() {
        Some(error) => Err(error),
        None => Ok(parsed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_items_are_told_from_items_about_errors() {
        let error = DynamoError::disconnected("gone");
        for codec in [PayloadCodec::Json, PayloadCodec::MessagePack] {
            let bytes = |item: &Annotated<&str>| {
                let mut out = Vec::new();
                corelane_codec::item::write_value(item, codec, &mut out).unwrap();
                out
            };
            let bad = bytes(&Annotated::from_error(error.clone()));
            assert_eq!(error_of(&bad, codec), Some(error.clone()));
            assert_eq!(typed::<String>(&bad, codec), Err(error.clone()));
            let good = bytes(&Annotated::from_data("no error"));
            assert_eq!(error_of(&good, codec), None);
            let found = typed::<String>(&good, codec).unwrap();
            assert_eq!(found.data.as_deref(), Some("no error"));
            assert!(typed::<u32>(&good, codec).is_err());
        }
    }
}
