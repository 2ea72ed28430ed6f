package volume

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
	"unicode"
	"unicode/utf8"
)

// IDs are made by this package and never by a user:
//
//	vol-<pool8>-<32 hex>    a volume
//	snap-<pool8>-<32 hex>   a snapshot
//	group-<pool8>-<32 hex>  a group snapshot
//
// pool8 is the first 8 digits of the pool's UUID. The 32 digits are 128 bits of
// HMAC-SHA256 over the CSI name with the pool's UUID as the key: a retry of the
// same request arrives at the same ID, and nobody who does not know the UUID
// can guess one. Only what matches these patterns ever becomes a path.
var (
	volumeIDPattern   = regexp.MustCompile(`^vol-([0-9a-f]{8})-[0-9a-f]{32}$`)
	snapshotIDPattern = regexp.MustCompile(`^snap-([0-9a-f]{8})-[0-9a-f]{32}$`)
	groupIDPattern    = regexp.MustCompile(`^group-([0-9a-f]{8})-[0-9a-f]{32}$`)
)

// PoolOf returns the first 8 digits of the UUID of the pool that the volume,
// snapshot or group snapshot id belongs to, or ErrInvalid when id is not one of ours.
func PoolOf(id string) (string, error) {
	for _, pattern := range []*regexp.Regexp{volumeIDPattern, snapshotIDPattern, groupIDPattern} {
		if m := pattern.FindStringSubmatch(id); m != nil {
			return m[1], nil
		}
	}
	return "", fmt.Errorf("%w: %q is not the ID of a volume, snapshot or group snapshot", ErrInvalid, id)
}

// idKind separates the names of volumes, snapshots and so on: equal names of
// different kinds get unrelated IDs.
type idKind string

const (
	kindVolume   idKind = "vol"
	kindSnapshot idKind = "snap"
	kindHidden   idKind = "hidden" // of the clone's volume ID
	kindGroup    idKind = "group"
	kindMember   idKind = "member" // of a group ID and a volume ID
)

// makeID returns the n-th candidate for the ID of name. Candidates after the
// first are for names whose earlier owner is a tombstone.
func (p *Pool) makeID(kind idKind, name string, n int) string {
	mac := hmac.New(sha256.New, []byte(p.uuid))
	for _, s := range []string{string(kind), name, strconv.Itoa(n)} {
		mac.Write([]byte(s))
		mac.Write([]byte{0})
	}
	prefix := kind
	if kind == kindHidden || kind == kindMember {
		prefix = kindSnapshot
	}
	return fmt.Sprintf("%s-%s-%s", prefix, p.ID(), hex.EncodeToString(mac.Sum(nil)[:16]))
}

// maxNameBytes is the limit of the CSI specification for names.
const maxNameBytes = 128

// checkName checks a CSI name: it is only ever stored and compared.
func checkName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: empty name", ErrInvalid)
	case len(name) > maxNameBytes:
		return fmt.Errorf("%w: name of %d bytes, at most %d", ErrInvalid, len(name), maxNameBytes)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: name is not UTF-8", ErrInvalid)
	}
	for _, r := range name {
		if unicode.IsControl(r) {
			return fmt.Errorf("%w: name %q contains a control character", ErrInvalid, name)
		}
	}
	return nil
}
