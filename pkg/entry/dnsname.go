package entry

import (
	"fmt"
	"strings"
)

// validateDNSNames checks the DNS names of an entry: each valid, no
// duplicates, a wildcard only as the first label and covering no other name.
func (e *Entry) validateDNSNames() error {
	if len(e.DNSNames) > MaxNames {
		return fmt.Errorf("entry has %d DNS names; the most is %d", len(e.DNSNames), MaxNames)
	}
	seen := make(map[string]bool, len(e.DNSNames))
	for _, name := range e.DNSNames {
		if err := ValidateDNSName(name); err != nil {
			return err
		}
		key := strings.ToLower(name)
		if seen[key] {
			return fmt.Errorf("DNS name %q appears twice", name)
		}
		seen[key] = true
	}
	for name := range seen {
		_, parent, ok := strings.Cut(name, ".")
		if wildcard := "*." + parent; ok && wildcard != name && seen[wildcard] {
			return fmt.Errorf("DNS name %q is covered by %q already", name, wildcard)
		}
	}
	return nil
}

// ValidateDNSName checks one DNS name for a certificate: labels of letters,
// digits, '-' and '_', of 1 to 63 characters, neither beginning nor ending
// with '-', at most 253 in all; the first label may be "*" if at least one
// label follows. RFC 1035 §2.3.1, RFC 5280 §4.2.1.6; underscores because
// names in use have them.
func ValidateDNSName(name string) error {
	if name == "" {
		return fmt.Errorf("DNS name is empty")
	}
	if len(name) > 253 {
		return fmt.Errorf("DNS name is %d characters long; the most is 253", len(name))
	}
	labels := strings.Split(name, ".")
	for i, label := range labels {
		if label == "*" && i == 0 {
			if len(labels) < 2 {
				return fmt.Errorf("DNS name %q is a wildcard for everything", name)
			}
			continue
		}
		if label == "" {
			return fmt.Errorf("DNS name %q has an empty label", name)
		}
		if len(label) > 63 {
			return fmt.Errorf("DNS name %q has a label of %d characters; the most is 63", name, len(label))
		}
		if label[0] == '-' || label[len(label)-1] == '-' {
			return fmt.Errorf("DNS name %q has a label that begins or ends with '-'", name)
		}
		for _, r := range label {
			switch {
			case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_':
			case r == '*':
				return fmt.Errorf("DNS name %q has a wildcard that is not its first label", name)
			default:
				return fmt.Errorf("DNS name %q contains %q", name, r)
			}
		}
	}
	return nil
}
