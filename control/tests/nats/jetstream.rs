//! Work queues and objects.

use std::time::Duration;

use corelane::nats::{MAX_AGE, Nats, ObjectName, Objects, QueueRole, WORKER_GROUP, WorkQueue};

use crate::lab::{NatsServer, run};

/// Long enough for a busy machine; nothing hangs on it passing.
const PATIENCE: Duration = Duration::from_secs(60);
/// What an empty queue is asked for.
const SHORT: Duration = Duration::from_millis(200);

async fn queue(nats: &Nats, role: QueueRole) -> WorkQueue {
    WorkQueue::open(nats, "Probe.Queue X", role, MAX_AGE)
        .await
        .unwrap()
}

#[test]
fn messages_are_given_once_counted_and_purged() {
    let server = NatsServer::start();
    run(async {
        let nats = Nats::connect(&server.options()).await.unwrap();
        let producer = queue(&nats, QueueRole::PublishOnly).await;
        assert_eq!(producer.name(), "probe_queue_x");
        for job in ["job1", "job2", "job3"] {
            producer.enqueue(job).await.unwrap();
        }
        assert_eq!(producer.publish("event", "{\"k\":1}").await.unwrap(), 4);
        producer.dequeue(SHORT).await.unwrap_err();

        let worker = queue(&nats, QueueRole::Shared).await;
        assert_eq!(
            (worker.size().await.unwrap(), worker.stored().await.unwrap()),
            (4, 4)
        );
        let taken = worker.dequeue(PATIENCE).await.unwrap().unwrap();
        assert_eq!(taken, "job1");
        // Another one shares what is left.
        let other = queue(&nats, QueueRole::Shared).await;
        assert_eq!(other.dequeue(PATIENCE).await.unwrap().unwrap(), "job2");
        assert_eq!(worker.dequeue(PATIENCE).await.unwrap().unwrap(), "job3");
        assert_eq!(
            worker.dequeue(PATIENCE).await.unwrap().unwrap(),
            "{\"k\":1}"
        );
        assert_eq!(worker.dequeue(SHORT).await.unwrap(), None);
        assert_eq!(
            (worker.size().await.unwrap(), worker.stored().await.unwrap()),
            (0, 4)
        );

        // One of its own gets everything; as long as it has not, nothing is purged.
        let own = queue(&nats, QueueRole::Named("c2".to_owned())).await;
        assert_eq!(own.size().await.unwrap(), 4);
        assert_eq!(own.purge_acknowledged().await.unwrap(), 0);
        assert_eq!(own.dequeue(PATIENCE).await.unwrap().unwrap(), "job1");
        assert_eq!(own.consumers().await.unwrap(), ["c2", WORKER_GROUP]);
        assert_eq!(own.consumer_count().await.unwrap(), 2);
        let purged = async {
            // Acknowledgements are not waited for, so the floor may rise a little later.
            loop {
                let purged = own.purge_acknowledged().await.unwrap();
                if purged > 0 {
                    return purged;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        assert_eq!(tokio::time::timeout(PATIENCE, purged).await.unwrap(), 1);
        assert_eq!(own.purge_up_to(3).await.unwrap(), 1);
        assert_eq!(own.stored().await.unwrap(), 2);
        own.shutdown(None).await.unwrap();
        own.shutdown(Some("nobody")).await.unwrap_err();
        assert_eq!(worker.consumers().await.unwrap(), [WORKER_GROUP]);
        assert_eq!(worker.purge().await.unwrap(), 2);
    });
}

#[test]
fn a_server_without_jetstream_says_so() {
    let server = NatsServer::configured(tempfile::tempdir().unwrap(), "");
    run(async {
        let mut options = server.options();
        options.request_max = Duration::from_secs(20);
        let nats = Nats::connect(&options).await.unwrap();
        let opened = WorkQueue::open(&nats, "q", QueueRole::Shared, MAX_AGE).await;
        let text = opened.unwrap_err().to_string();
        assert!(text.contains("JetStream"), "{text}");
    });
}

#[test]
fn objects_go_up_and_come_down() {
    let server = NatsServer::start();
    run(async {
        let nats = Nats::connect(&server.options()).await.unwrap();
        let objects = Objects::new(&nats);
        let name = ObjectName::parse("nats://ignored/probe-bucket/model.bin").unwrap();
        objects.download(&name).await.unwrap_err();
        let content: Vec<u8> = (0..300_000_u32).map(|byte| (byte % 251) as u8).collect();
        objects.upload(&name, &content[..]).await.unwrap();
        assert!(objects.download(&name).await.unwrap() == content);
        objects.upload(&name, &b"short"[..]).await.unwrap();
        assert_eq!(objects.download(&name).await.unwrap(), b"short");
        objects.remove_bucket("probe-bucket").await.unwrap();
        objects.remove_bucket("probe-bucket").await.unwrap();
        objects.download(&name).await.unwrap_err();
    });
}
