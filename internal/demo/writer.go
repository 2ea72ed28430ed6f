package demo

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	writerFileBytes = 64 << 10
	writerMaxFiles  = 3000 // 188 MiB
)

// A writer writes numbered files into a directory, one after another, each
// synced before the next begins: a database that must not lose a commit.
type writer struct {
	dir string

	mu      sync.Mutex
	synced  []checksum    // guarded by mu; by number
	slowest time.Duration // guarded by mu; of the longest file since the last look
	err     error         // guarded by mu; the first

	stop chan struct{}
	done sync.WaitGroup
}

// startWriter starts a writer on a new directory dir.
func startWriter(dir string) (*writer, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	w := &writer{dir: dir, stop: make(chan struct{})}
	w.done.Go(w.run) // ends at stop, at the bound, or with an error
	return w, nil
}

func (w *writer) path(number int) string { return filepath.Join(w.dir, fmt.Sprintf("%06d", number)) }

func (w *writer) run() {
	random := rand.NewChaCha8(sha256.Sum256([]byte(w.dir)))
	content := make([]byte, writerFileBytes)
	for number := range writerMaxFiles {
		select {
		case <-w.stop:
			return
		default:
		}
		_, _ = random.Read(content) // never fails
		begin := time.Now()
		err := w.write(w.path(number), content)
		w.mu.Lock()
		if err != nil {
			w.err = err
		} else {
			w.synced = append(w.synced, sha256.Sum256(content))
			w.slowest = max(w.slowest, time.Since(begin))
		}
		w.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// write makes a file with content, durable with its name.
func (w *writer) write(path string, content []byte) error {
	if err := writeSynced(path, content); err != nil {
		return err
	}
	dir, err := os.Open(w.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// count returns how many files are synced.
func (w *writer) count() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.synced)
}

// longest returns the time of the slowest file since the last call.
func (w *writer) longest() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.slowest
	w.slowest = 0
	return d
}

// wait waits until at least n files are synced.
func (w *writer) wait(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	for {
		w.mu.Lock()
		count, err := len(w.synced), w.err
		w.mu.Unlock()
		switch {
		case err != nil:
			return err
		case count >= n:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("the writer is stuck at %d files: %w", count, ctx.Err())
		}
		time.Sleep(time.Millisecond)
	}
}

// end stops the writer, waits for it and returns its first error.
func (w *writer) end() error {
	close(w.stop)
	w.done.Wait()
	return w.err
}

// holds returns an error unless the copy of the writer's directory in dir has
// the files [0, upTo) whole, and none of those from notFrom on.
func (w *writer) holds(dir string, upTo, notFrom int) error {
	copied := writer{dir: dir}
	for number := range upTo {
		sum, err := sumFile(copied.path(number))
		if err != nil {
			return fmt.Errorf("synced before the snapshot, but: %w", err)
		}
		if sum != w.synced[number] {
			return fmt.Errorf("%s was synced before the snapshot, but differs", copied.path(number))
		}
	}
	if _, err := os.Stat(copied.path(notFrom)); err == nil {
		return fmt.Errorf("%s was begun after the snapshot had returned, but is in it", copied.path(notFrom))
	}
	return nil
}
