package jwt

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// maxDepth is how many objects and arrays may be within each other.
const maxDepth = 32

// DecodeObject decodes one JSON object. Other than encoding/json it refuses
// names that occur twice, about which two readers may disagree, and text that
// is not UTF-8.
func DecodeObject(raw []byte) (map[string]any, error) {
	if !utf8.Valid(raw) {
		return nil, errors.New("it is not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	value, err := decodeValue(d, maxDepth)
	if err != nil {
		return nil, fmt.Errorf("it is not JSON: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("it is not JSON: more follows the object")
	}
	object, ok := value.(map[string]any)
	if !ok {
		return nil, errors.New("it is not a JSON object")
	}
	return object, nil
}

func decodeValue(d *json.Decoder, depth int) (any, error) {
	token, err := d.Token()
	if errors.Is(err, io.EOF) {
		return nil, io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	delim, ok := token.(json.Delim)
	if !ok {
		return token, nil
	}
	if depth == 0 {
		return nil, fmt.Errorf("more than %d levels", maxDepth)
	}
	if delim == '[' {
		array := []any{}
		for d.More() {
			value, err := decodeValue(d, depth-1)
			if err != nil {
				return nil, err
			}
			array = append(array, value)
		}
		_, err := d.Token()
		return array, err
	}
	object := make(map[string]any)
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		key, ok := name.(string)
		if !ok {
			return nil, errors.New("a name is not a string")
		}
		if _, ok := object[key]; ok {
			return nil, fmt.Errorf("%q occurs twice", key)
		}
		if object[key], err = decodeValue(d, depth-1); err != nil {
			return nil, err
		}
	}
	_, err = d.Token()
	return object, err
}
