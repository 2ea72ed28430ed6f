package durable

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
)

// ErrDamaged: a record does not decode, or its checksum does not match.
var ErrDamaged = errors.New("durable: damaged record")

// An envelope is what is on disk around a record:
//
//	{"kind":"volume","version":1,"checksum":"crc32c:1b2c3d4e","data":{…}}
//
// The checksum covers the bytes of data as they stand in the file.
type envelope struct {
	Kind     string          `json:"kind"`
	Version  int             `json:"version"`
	Checksum string          `json:"checksum"`
	Data     json.RawMessage `json:"data"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(data []byte) string {
	return fmt.Sprintf("crc32c:%08x", crc32.Checksum(data, castagnoli))
}

// EncodeRecord returns v as a record of the kind and version.
func EncodeRecord(kind string, version int, v any) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(envelope{kind, version, checksum(data), data})
	if err != nil {
		return nil, err
	}
	return append(b, '\n'), nil
}

// DecodeRecord decodes b into v. It refuses, with ErrDamaged, another kind, a
// version other than version, a wrong checksum and unknown fields: what this
// program does not understand it must not rewrite.
func DecodeRecord(b []byte, kind string, version int, v any) error {
	var e envelope
	if err := strictUnmarshal(b, &e); err != nil {
		return fmt.Errorf("%w: %v", ErrDamaged, err)
	}
	switch {
	case e.Kind != kind:
		return fmt.Errorf("%w: kind %q, not %q", ErrDamaged, e.Kind, kind)
	case e.Version != version:
		return fmt.Errorf("%w: %s record of version %d, this program knows %d", ErrDamaged, kind, e.Version, version)
	case e.Checksum != checksum(e.Data):
		return fmt.Errorf("%w: checksum %s, content has %s", ErrDamaged, e.Checksum, checksum(e.Data))
	}
	if err := strictUnmarshal(e.Data, v); err != nil {
		return fmt.Errorf("%w: %v", ErrDamaged, err)
	}
	return nil
}

func strictUnmarshal(b []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return err
	}
	if dec.More() {
		return errors.New("data after the record")
	}
	return nil
}

// WriteRecord replaces the record name in d.
func WriteRecord(d *Dir, name, kind string, version int, v any) error {
	b, err := EncodeRecord(kind, version, v)
	if err != nil {
		return err
	}
	return d.WriteFile(name, b)
}

// ReadRecord reads the record name in d into v.
func ReadRecord(d *Dir, name, kind string, version int, v any) error {
	b, err := d.ReadFile(name)
	if err != nil {
		return err
	}
	if err := DecodeRecord(b, kind, version, v); err != nil {
		return fmt.Errorf("record %q: %w", d.path+"/"+name, err)
	}
	return nil
}
