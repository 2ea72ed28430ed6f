package demo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
)

const (
	blockBytes   = 256 * mib
	patternBytes = 32 * mib
	patternAt    = 100 * mib // offset in the raw block volume
)

// A block is the life of a raw block volume.
type block struct {
	*demo
	volume  *volume
	pattern []byte
}

func (b *block) write(ctx context.Context) (err error) {
	if b.volume, err = b.demo.create(ctx, "block", "", blockBytes, content{}); err != nil {
		return err
	}
	target, err := b.mount(ctx, b.volume)
	if err != nil {
		return err
	}
	b.pattern = make([]byte, patternBytes)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte("block"))).Read(b.pattern) // never fails
	if err := writeDevice(target, b.pattern); err != nil {
		return err
	}
	got, err := readDevice(target)
	if err != nil {
		return err
	}
	b.print.detail("written", "%s at offset %s, read back from the device", size(patternBytes), size(patternAt))
	return b.hold(bytes.Equal(got, b.pattern), "the device reads what was written")
}

// writeDevice writes p into the device and makes it durable.
func writeDevice(path string, p []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(p, patternAt); err != nil {
		return err
	}
	return f.Sync()
}

// readDevice reads what writeDevice wrote, past the page cache.
func readDevice(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKFLSBUF, 0); err != nil {
		return nil, os.NewSyscallError("BLKFLSBUF", err)
	}
	p := make([]byte, patternBytes)
	_, err = f.ReadAt(p, patternAt)
	return p, err
}

func (b *block) clone(ctx context.Context) error {
	clone, err := b.demo.create(ctx, "block-clone", "", blockBytes, content{volume: b.volume.id})
	if err != nil {
		return err
	}
	if err := b.backing(ctx, clone, b.volume); err != nil {
		return err
	}
	if err := writeDevice(b.stage.target(b.volume.id), make([]byte, patternBytes)); err != nil {
		return err
	}
	raw := b.stage.path("qemu", "block.raw")
	if err := command(ctx, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", b.stage.disk(clone.id), raw); err != nil {
		return err
	}
	defer os.Remove(raw)
	f, err := os.Open(raw)
	if err != nil {
		return err
	}
	defer f.Close()
	got, err := io.ReadAll(io.NewSectionReader(f, patternAt, patternBytes))
	if err != nil {
		return err
	}
	b.print.detail("qemu-img", "reads the old content from the clone, the source has the new")
	return b.hold(bytes.Equal(got, b.pattern), "the clone has what the source had")
}

// statistics compares what NodeGetVolumeStats says with what the kernel says.
func (d *demo) statistics(ctx context.Context) error {
	for _, v := range d.volumes {
		target := d.stage.target(v.id)
		if _, err := os.Stat(target); err != nil {
			continue // not published
		}
		usage, err := d.client.stats(ctx, v)
		if err != nil {
			return err
		}
		said := usage[csi.VolumeUsage_BYTES]
		if v.fs == "" {
			d.print.detail("", "%-14s %9s", v.name, size(said.GetTotal()))
			if err := d.hold(said.GetTotal() == v.bytes, "%s has %d bytes, the driver says %d", v.name, v.bytes, said.GetTotal()); err != nil {
				return err
			}
			continue
		}
		total, available, err := capacity(target)
		if err != nil {
			return err
		}
		d.print.detail("", "%-14s %9s, %9s used, %9s free, %d inodes", v.name, size(said.GetTotal()), size(said.GetUsed()), size(said.GetAvailable()), usage[csi.VolumeUsage_INODES].GetTotal())
		if err := d.hold(said.GetTotal() == total && near(said.GetAvailable(), available, total/100),
			"%s has %d bytes with %d free, the driver says %d with %d", v.name, total, available, said.GetTotal(), said.GetAvailable()); err != nil {
			return err
		}
		if err := d.hold(usage[csi.VolumeUsage_INODES].GetTotal() > 0, "the driver counts the inodes of %s", v.name); err != nil {
			return err
		}
	}
	return nil
}

// near reports whether a and b differ by at most by.
func near(a, b, by int64) bool { return a-b <= by && b-a <= by }

// trim deletes a large file and gives its space back to the host.
func (l *life) trim(ctx context.Context) error {
	const bytes = 128 * mib
	target, disk := l.stage.target(l.restored.id), l.stage.disk(l.restored.id)
	large := filepath.Join(target, "large")
	content := make([]byte, bytes)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte("trim"))).Read(content) // never fails
	empty, err := onHost(disk)
	if err != nil {
		return err
	}
	if err := os.WriteFile(large, content, 0o600); err != nil {
		return err
	}
	if err := syncFilesystem(target); err != nil {
		return err
	}
	full, err := onHost(disk)
	if err != nil {
		return err
	}
	if err := l.hold(full-empty > bytes*9/10, "%s of data take space on the host: %s before, %s with them", size(bytes), size(empty), size(full)); err != nil {
		return err
	}
	if err := os.Remove(large); err != nil {
		return err
	}
	if err := syncFilesystem(target); err != nil {
		return err
	}
	if err := command(ctx, "fstrim", target); err != nil {
		return err
	}
	// The space goes back once the tables that dropped it are durable: at the
	// volume's next flush, and an idle filesystem sends none.
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	for {
		trimmed, err := onHost(disk)
		if err != nil {
			return err
		}
		if full-trimmed > bytes*9/10 {
			l.print.detail("on host", "%s, with a file of %s %s, after fstrim %s", size(empty), size(bytes), size(full), size(trimmed))
			return l.hold(true, "the space is back")
		}
		select {
		case <-ctx.Done():
			return l.hold(false, "the space is back: %s before fstrim, %s after", size(full), size(trimmed))
		case <-time.After(50 * time.Millisecond):
		}
		if err := writeSynced(large+".after", []byte("flush")); err != nil {
			return err
		}
	}
}

// writeSynced makes a file durable, which flushes the device below.
func writeSynced(path string, content []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.Sync()
}
