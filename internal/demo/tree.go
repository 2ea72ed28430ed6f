package demo

import (
	"crypto/sha256"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// own is the source of this package: what the demo stores where no larger
// source tree is at hand.
//
//go:embed *.go
var own embed.FS

// Bounds of the tree that is stored, so that a volume of 1 GiB takes it and a
// small machine is done with it soon.
const (
	maxTreeFiles = 4000
	maxTreeBytes = 64 << 20
)

type checksum [sha256.Size]byte

// A manifest has the checksum of every file of a tree, by relative path.
type manifest map[string]checksum

// paths returns the paths of m in order.
func (m manifest) paths() []string { return slices.Sorted(maps.Keys(m)) }

// source returns the files to store and where they come from. dir "" takes
// the embedded ones.
func source(dir string) (fs.FS, string, error) {
	if dir == "" {
		return own, "the demo's own source", nil
	}
	if info, err := os.Stat(dir); err != nil {
		return nil, "", err
	} else if !info.IsDir() {
		return nil, "", fmt.Errorf("source %q is not a directory", dir)
	}
	return os.DirFS(dir), dir, nil
}

var errFull = errors.New("enough files")

// copyTree writes the regular files of from below dir, up to the bounds, and
// makes them durable. It returns their checksums and their total size.
func copyTree(from fs.FS, dir string, interrupted func() error) (manifest, int64, error) {
	sums, total := manifest{}, int64(0)
	err := fs.WalkDir(from, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := interrupted(); err != nil {
			return err
		}
		target := filepath.Join(dir, name)
		switch {
		case entry.IsDir():
			return os.MkdirAll(target, 0o755)
		case !entry.Type().IsRegular():
			return nil
		case len(sums) >= maxTreeFiles || total >= maxTreeBytes:
			return errFull
		}
		content, err := fs.ReadFile(from, name)
		if err != nil {
			return err
		}
		sums[name] = sha256.Sum256(content)
		total += int64(len(content))
		return os.WriteFile(target, content, 0o644)
	})
	if err != nil && !errors.Is(err, errFull) {
		return nil, 0, err
	}
	return sums, total, syncFilesystem(dir)
}

// syncFilesystem makes everything on the filesystem of dir durable.
func syncFilesystem(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// change appends to some files of the tree below dir, removes some and adds
// some, and returns the manifest of what is there then.
func change(dir string, before manifest) (after manifest, changed, removed, added int, err error) {
	after = maps.Clone(before)
	for i, name := range before.paths() {
		path := filepath.Join(dir, name)
		switch i % 10 {
		case 3:
			content, err := os.ReadFile(path)
			if err != nil {
				return nil, 0, 0, 0, err
			}
			content = append(content, "// changed after the snapshot\n"...)
			if err := os.WriteFile(path, content, 0o644); err != nil {
				return nil, 0, 0, 0, err
			}
			after[name] = sha256.Sum256(content)
			changed++
		case 6:
			if err := os.Remove(path); err != nil {
				return nil, 0, 0, 0, err
			}
			delete(after, name)
			removed++
		case 9:
			content := fmt.Appendf(nil, "added beside %s after the snapshot\n", name)
			if err := os.WriteFile(path+".added", content, 0o644); err != nil {
				return nil, 0, 0, 0, err
			}
			after[name+".added"] = sha256.Sum256(content)
			added++
		}
	}
	return after, changed, removed, added, syncFilesystem(dir)
}

// compare reads the tree below dir and returns an error that names the first
// files that are not as want says, or are not in it.
func compare(dir string, want manifest, interrupted func() error) error {
	var wrong []string
	seen := 0
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := interrupted(); err != nil {
			return err
		}
		if entry.IsDir() {
			return nil
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		sum, err := sumFile(path)
		if err != nil {
			return err
		}
		seen++
		if wanted, ok := want[name]; !ok {
			wrong = append(wrong, name+" should not be there")
		} else if sum != wanted {
			wrong = append(wrong, name+" differs")
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(wrong) > 0 {
		return fmt.Errorf("%d files are wrong, the first: %s", len(wrong), wrong[0])
	}
	if seen != len(want) {
		return fmt.Errorf("%d files are there, want %d", seen, len(want))
	}
	return nil
}

// sumFile returns the checksum of a file.
func sumFile(path string) (sum checksum, err error) {
	f, err := os.Open(path)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}
