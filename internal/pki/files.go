package pki

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The names of an identity's parts, as files and as keys of a Secret.
const (
	CertificateName = "tls.crt"
	KeyName         = "tls.key"
	BundleName      = "ca.crt"
)

// Files returns a source that reads the directory dir, in which a Secret is
// mounted, at every handshake.
func Files(dir string) Source {
	return func() (*Identity, error) {
		// Kubelet replaces all files at once by changing the link ..data. Who
		// follows it once reads one generation, not parts of two.
		at, err := filepath.EvalSymlinks(filepath.Join(dir, "..data"))
		if errors.Is(err, fs.ErrNotExist) {
			at = dir
		} else if err != nil {
			return nil, fmt.Errorf("pki: %w", err)
		}
		var id Identity
		for name, to := range map[string]*[]byte{CertificateName: &id.Certificate, KeyName: &id.Key, BundleName: &id.Bundle} {
			if *to, err = os.ReadFile(filepath.Join(at, name)); err != nil {
				return nil, fmt.Errorf("pki: no identity yet: %w", err)
			}
		}
		return &id, nil
	}
}
