//! What the log says of the life of an endpoint. Alone in its process: what is logged is asked of
//! the whole process once.

mod component_lab;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use component_lab::{echo, endpoint, options, with_runtime};
use corelane::component::State;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn scrape(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = "GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[test]
fn every_change_of_state_is_a_line_of_the_log_and_a_count() {
    let log = Arc::new(Mutex::new(Vec::new()));
    let written = Arc::clone(&log);
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || Lines(Arc::clone(&written)))
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
    with_runtime(options().status(any), async |runtime| {
        let served = endpoint(runtime, "logged").serve(echo).await.unwrap();
        served.stop().await;
        let text = scrape(runtime.status_address().unwrap()).await;
        for state in State::ALL {
            let series = format!(
                "corelane_endpoint_state_changes_total{{endpoint=\"production/worker/logged\",\
                 state=\"{state}\"}} 1\n"
            );
            assert!(text.contains(&series), "{series}{text}");
        }
    });
    let log = String::from_utf8(log.lock().unwrap().clone()).unwrap();
    let lines = log
        .lines()
        .filter(|line| line.contains("endpoint changed its state"));
    let word = |line: &str, name: &str| {
        let at = line.find(name).unwrap() + name.len();
        line[at..].split_whitespace().next().unwrap().to_owned()
    };
    let steps: Vec<_> = lines
        .filter(|line| word(line, "endpoint=") == "production/worker/logged")
        .map(|line| (word(line, "from="), word(line, "to=")))
        .collect();
    let words = State::ALL.map(State::word);
    let wanted: Vec<_> = words
        .windows(2)
        .map(|pair| (pair[0].to_owned(), pair[1].to_owned()))
        .collect();
    assert_eq!(steps, wanted);
}

struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
