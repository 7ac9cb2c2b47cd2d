//! What the network element's admin socket understands: `{"command":"status"}`.

use std::pin::Pin;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::input::Input;
use crate::daemon::admin::error;

/// How long the owner may take.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    command: String,
}

/// For [`AdminSocket::serve`](crate::daemon::admin::AdminSocket::serve): asks the owner.
pub fn answers(
    owner: mpsc::Sender<Input>,
) -> impl Fn(String) -> Pin<Box<dyn Future<Output = Value> + Send>> + Clone + Send + 'static {
    move |line| {
        let owner = owner.clone();
        Box::pin(async move {
            match serde_json::from_str::<Request>(&line) {
                Ok(request) if request.command == "status" => status(&owner).await,
                Ok(request) => error(format_args!("unknown command `{}`; there is: status", request.command)),
                Err(what) => error(format_args!("write one line such as {{\"command\":\"status\"}}: {what}")),
            }
        })
    }
}

async fn status(owner: &mpsc::Sender<Input>) -> Value {
    let (done, status) = oneshot::channel();
    let _ = owner.send(Input::Status { done }).await;
    match timeout(PATIENCE, status).await {
        Ok(Ok(status)) => json!({"status": status}),
        _ => error("the daemon is shutting down, or too busy to answer"),
    }
}
