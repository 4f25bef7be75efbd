//! `/engine/{path}` of the status server: what a worker lets operators ask of its engine
//! (`spec/events-discovery.md` §7.4).
//!
//! ```text
//! POST /engine/sleep {"level":1}  ->  the callback at `sleep` gets {"level":1}  ->  its JSON
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use http_body_util::{BodyExt, Limited};
use hyper::StatusCode;
use hyper::body::Incoming;
use serde_json::{Value, json};

/// Longest body of a request.
pub const BODY_BYTES_MAX: usize = 1 << 20;

type Answering = Pin<Box<dyn Future<Output = Result<Value, String>>>>;
type Callback = Rc<dyn Fn(Value) -> Answering>;

/// The callbacks of one process, by path. Clones are the same list.
#[derive(Clone, Default)]
pub struct EngineRoutes(Rc<RefCell<BTreeMap<String, Callback>>>);

impl fmt::Debug for EngineRoutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.borrow().keys()).finish()
    }
}

impl EngineRoutes {
    /// From now on `callback` answers at `/engine/{path}`, with JSON or with a text that says what
    /// went wrong. The one that was there before is given up.
    pub fn set<A>(&self, path: &str, callback: impl Fn(Value) -> A + 'static)
    where
        A: Future<Output = Result<Value, String>> + 'static,
    {
        let callback: Callback = Rc::new(move |body| Box::pin(callback(body)));
        let path = path.trim_matches('/').to_owned();
        self.0.borrow_mut().insert(path, callback);
    }

    /// Takes a callback away.
    pub fn remove(&self, path: &str) {
        self.0.borrow_mut().remove(path.trim_matches('/'));
    }

    /// The answer to a request below `/engine/`.
    pub(crate) async fn answer(&self, path: &str, body: Incoming) -> (StatusCode, Value) {
        let callback = self.0.borrow().get(path).cloned();
        let Some(callback) = callback else {
            let message = format!("Route /engine/{path} not found");
            return refuse(StatusCode::NOT_FOUND, "Route not found", &message);
        };
        let bytes = match Limited::new(body, BODY_BYTES_MAX).collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => {
                let message = format!("the body is cut off, or longer than {BODY_BYTES_MAX} bytes");
                return refuse(StatusCode::BAD_REQUEST, "Invalid JSON", &message);
            }
        };
        let body = match bytes.is_empty() {
            true => Ok(json!({})),
            false => serde_json::from_slice(&bytes),
        };
        match body {
            Err(error) => refuse(StatusCode::BAD_REQUEST, "Invalid JSON", &error.to_string()),
            Ok(body) => match callback(body).await {
                Ok(answer) => (StatusCode::OK, answer),
                Err(why) => refuse(StatusCode::INTERNAL_SERVER_ERROR, "Handler error", &why),
            },
        }
    }
}

fn refuse(status: StatusCode, error: &str, message: &str) -> (StatusCode, Value) {
    (status, json!({"error": error, "message": message}))
}
