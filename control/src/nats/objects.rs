//! Files in NATS's object store (spec/events-discovery.md §6.7): named by a URL,
//! `nats://HOST/BUCKET/KEY`, whose host does not matter.

use async_nats::jetstream;
use async_nats::jetstream::context::ObjectStoreErrorKind;
use async_nats::jetstream::object_store::{Config, ObjectStore};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{Nats, NatsError};

/// Largest object that [`Objects::download`] takes into memory.
pub const OBJECT_BYTES_MAX: u64 = 1 << 30;

/// The object store of a connection.
#[derive(Clone, Debug)]
pub struct Objects(jetstream::Context);

/// Where an object is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ObjectName {
    /// Its bucket.
    pub bucket: String,
    /// Its key in there.
    pub key: String,
}

impl ObjectName {
    /// Reads a URL.
    ///
    /// # Errors
    /// It is not `nats://HOST/BUCKET/KEY`.
    pub fn parse(url: &str) -> Result<ObjectName, NatsError> {
        let bad = || {
            let url = url.escape_debug();
            NatsError::Service(format!("{url}: write nats://HOST/BUCKET/KEY"))
        };
        let rest = url.strip_prefix("nats://").ok_or_else(bad)?;
        let mut parts = rest.split('/').skip(1);
        match (parts.next(), parts.next()) {
            (Some(bucket), Some(key)) if !bucket.is_empty() && !key.is_empty() => Ok(ObjectName {
                bucket: bucket.to_owned(),
                key: key.to_owned(),
            }),
            _ => Err(bad()),
        }
    }
}

fn failed(error: impl std::error::Error) -> NatsError {
    NatsError::Service(format!("object store: {}", super::chain(&error)))
}

impl Objects {
    /// Over this connection.
    pub fn new(nats: &Nats) -> Objects {
        Objects(jetstream::new(nats.client().clone()))
    }

    /// Stores all that can be read, under a name that may be taken already. A bucket that is not
    /// there is made.
    ///
    /// # Errors
    /// It cannot be read, or the server refuses.
    pub async fn upload(
        &self,
        name: &ObjectName,
        mut content: impl AsyncRead + Unpin,
    ) -> Result<(), NatsError> {
        let store = match self.store(&name.bucket).await? {
            Some(store) => store,
            None => {
                let config = Config {
                    bucket: name.bucket.clone(),
                    ..Config::default()
                };
                let made = self.0.create_object_store(config).await;
                made.map_err(failed)?
            }
        };
        store
            .put(name.key.as_str(), &mut content)
            .await
            .map_err(failed)?;
        Ok(())
    }

    /// The whole of an object.
    ///
    /// # Errors
    /// There is no such bucket or object, or it is larger than [`OBJECT_BYTES_MAX`].
    pub async fn download(&self, name: &ObjectName) -> Result<Vec<u8>, NatsError> {
        let missing = || NatsError::Service(format!("object store: no bucket {:?}", name.bucket));
        let store = self.store(&name.bucket).await?.ok_or_else(missing)?;
        let object = store.get(name.key.as_str()).await.map_err(failed)?;
        let mut content = Vec::new();
        let mut bounded = object.take(OBJECT_BYTES_MAX + 1);
        bounded.read_to_end(&mut content).await.map_err(failed)?;
        if content.len() as u64 > OBJECT_BYTES_MAX {
            let text = format!("object store: more than {OBJECT_BYTES_MAX} bytes");
            return Err(NatsError::Service(text));
        }
        Ok(content)
    }

    /// Removes a bucket with all that is in it; one that is not there is fine.
    ///
    /// # Errors
    /// The server refuses.
    pub async fn remove_bucket(&self, bucket: &str) -> Result<(), NatsError> {
        if self.store(bucket).await?.is_none() {
            return Ok(());
        }
        self.0.delete_object_store(bucket).await.map_err(failed)
    }

    /// A bucket; `None` if it is not there.
    async fn store(&self, bucket: &str) -> Result<Option<ObjectStore>, NatsError> {
        match self.0.get_object_store(bucket).await {
            Ok(store) => Ok(Some(store)),
            Err(error) if error.kind() == ObjectStoreErrorKind::GetStore => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_first_two_segments() {
        let name = ObjectName::parse("nats://anywhere:1/bucket/key").unwrap();
        assert_eq!((&name.bucket[..], &name.key[..]), ("bucket", "key"));
        for wrong in [
            "nats://h",
            "nats://h/b",
            "nats://h//k",
            "nats://h/b/",
            "h/b/k",
        ] {
            assert!(ObjectName::parse(wrong).is_err(), "{wrong}");
        }
    }
}
