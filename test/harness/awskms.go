package harness

import (
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"sort"
	"strings"
)

// awsKinds are KMS's names of the kinds of keys.
var awsKinds = map[string]string{
	"ECC_NIST_P256": "ec-p256", "ECC_NIST_P384": "ec-p384", "RSA_2048": "rsa-2048", "RSA_3072": "rsa-3072", "RSA_4096": "rsa-4096",
}

// KMS is AWS KMS, of the region us-east-1: JSON 1.1. Requests must be signed, by
// credentials that [AWS.Key] made known.
func (a *AWS) KMS(ring *KeyRing) http.Handler {
	aliases := make(map[string]string) // to IDs
	aliased := make(map[string]float64)
	return ring.serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		refuse := func(kind string) {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			w.WriteHeader(http.StatusBadRequest)
			_ = json.NewEncoder(w).Encode(map[string]string{"__type": kind, "message": "no"})
		}
		reply := func(value any) {
			w.Header().Set("Content-Type", "application/x-amz-json-1.1")
			_ = json.NewEncoder(w).Encode(value)
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		a.mu.Lock()
		by, scope := a.signedBy(r, body), r.Header.Get("Authorization")
		a.mu.Unlock()
		if by == "" || !strings.Contains(scope, "/us-east-1/kms/aws4_request") {
			refuse("IncompleteSignatureException")
			return
		}
		var in struct {
			KeyID               string `json:"KeyId"`
			KeySpec, KeyUsage   string
			Tags                []struct{ TagKey, TagValue string }
			AliasName           string
			TargetKeyID         string `json:"TargetKeyId"`
			Message             []byte
			MessageType         string
			SigningAlgorithm    string
			PendingWindowInDays int
			Limit               int
			Marker              string
		}
		if err != nil || json.Unmarshal(body, &in) != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" {
			refuse("SerializationException")
			return
		}
		id := in.KeyID
		if strings.HasPrefix(id, "alias/") {
			id = aliases[id]
		}
		action, _ := strings.CutPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")
		key := ring.keys[id]
		switch action {
		case "CreateKey", "CreateAlias", "DeleteAlias", "ListAliases":
		default:
			if key == nil {
				refuse("NotFoundException")
				return
			}
			if key.deleted && action != "DescribeKey" {
				refuse("KMSInvalidStateException")
				return
			}
		}
		state := func(k *ringKey) map[string]any {
			s := "Enabled"
			if k.deleted {
				s = "PendingDeletion"
			}
			return map[string]any{"KeyMetadata": map[string]any{
				"KeyId": k.id, "Arn": "arn:aws:kms:us-east-1:111122223333:key/" + k.id, "KeyState": s, "KeyUsage": "SIGN_VERIFY",
				"CreationDate": float64(k.created.Unix()),
			}}
		}
		switch action {
		case "CreateKey":
			kind := awsKinds[in.KeySpec]
			if kind == "" || in.KeyUsage != "SIGN_VERIFY" {
				refuse("ValidationException")
				return
			}
			tags := make(map[string]string)
			for _, tag := range in.Tags {
				tags[tag.TagKey] = tag.TagValue
			}
			reply(state(ring.make("", kind, tags)))
		case "CreateAlias":
			switch {
			case aliases[in.AliasName] != "":
				refuse("AlreadyExistsException")
			case ring.keys[in.TargetKeyID] == nil || !strings.HasPrefix(in.AliasName, "alias/") || len(in.AliasName) > 256:
				refuse("ValidationException")
			default:
				aliases[in.AliasName] = in.TargetKeyID
				aliased[in.AliasName] = float64(ring.now().Unix())
			}
		case "DeleteAlias":
			if aliases[in.AliasName] == "" {
				refuse("NotFoundException")
				return
			}
			delete(aliases, in.AliasName)
		case "ListAliases":
			var names []string
			for name := range aliases {
				names = append(names, name)
			}
			sort.Strings(names)
			from, _ := slices.BinarySearch(names, in.Marker)
			// Pages of two, however many were asked for: it may have less in one.
			page := names[from:min(len(names), from+2)]
			out := map[string]any{"Truncated": from+2 < len(names)}
			if from+2 < len(names) {
				out["NextMarker"] = names[from+2]
			}
			var list []any
			for _, name := range page {
				list = append(list, map[string]any{
					"AliasName": name, "AliasArn": "arn:aws:kms:us-east-1:111122223333:" + name,
					"TargetKeyId": aliases[name], "CreationDate": aliased[name],
				})
			}
			out["Aliases"] = list
			reply(out)
		case "DescribeKey":
			reply(state(key))
		case "GetPublicKey":
			reply(map[string]any{"KeyId": "arn:aws:kms:us-east-1:111122223333:key/" + key.id, "PublicKey": ring.publicDER(key), "KeyUsage": "SIGN_VERIFY"})
		case "Sign":
			want := map[string]string{"ec-p256": "ECDSA_SHA_256", "ec-p384": "ECDSA_SHA_384"}[key.kind]
			if want == "" {
				want = "RSASSA_PKCS1_V1_5_SHA_256"
			}
			signature, ok := ring.sign(key, in.Message)
			if !ok || in.SigningAlgorithm != want || in.MessageType != "DIGEST" {
				refuse("ValidationException")
				return
			}
			reply(map[string]any{"KeyId": key.id, "Signature": signature, "SigningAlgorithm": want})
		case "ScheduleKeyDeletion":
			if in.PendingWindowInDays < 7 || in.PendingWindowInDays > 30 {
				refuse("ValidationException")
				return
			}
			key.deleted = true
			reply(map[string]any{"KeyId": key.id, "KeyState": "PendingDeletion", "PendingWindowInDays": in.PendingWindowInDays})
		default:
			refuse("UnknownOperationException")
		}
	}))
}
