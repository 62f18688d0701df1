package statuslist

import (
	"encoding/binary"
	"encoding/hex"
	"path"
)

// Of lists that hallmark makes, the last part of the URI is the list's ID, 32
// hexadecimal digits. A token's serial number, which names it as a certificate's
// does, is the ID and the index: 20 bytes. The first bit of an ID is set, so that
// no certificate has such a number: those are positive, and of at most 20 octets
// (RFC 5280 §4.1.2.2).
const (
	idSize     = 16
	serialSize = idSize + 4
	firstBit   = 0x80
)

// NewID makes a list's ID of 16 random bytes.
func NewID(random [idSize]byte) string {
	random[0] |= firstBit
	return hex.EncodeToString(random[:])
}

// IsSerial reports whether a serial number, big endian, is a token's.
func IsSerial(serial []byte) bool { return len(serial) == serialSize && serial[0]&firstBit != 0 }

// Serial returns the serial number of the token with an index in the list of an
// ID, and false if there is no such ID.
func Serial(id string, index uint32) (serial [serialSize]byte, ok bool) {
	raw, err := hex.DecodeString(id)
	if err != nil || len(raw) != idSize || raw[0]&firstBit == 0 {
		return serial, false
	}
	binary.BigEndian.PutUint32(serial[copy(serial[:], raw):], index)
	return serial, true
}

// Serial returns the serial number of the token that has the reference, and false
// if the list is none that hallmark makes.
func (r Reference) Serial() (serial [serialSize]byte, ok bool) {
	return Serial(path.Base(r.URI), uint32(r.Index)) // an index of a list fits
}

// Place returns the ID of the list and the index of a token's serial number, and
// false if it is not a token's.
func Place(serial []byte) (id string, index int, ok bool) {
	if !IsSerial(serial) {
		return "", 0, false
	}
	return hex.EncodeToString(serial[:idSize]), int(binary.BigEndian.Uint32(serial[idSize:])), true
}
