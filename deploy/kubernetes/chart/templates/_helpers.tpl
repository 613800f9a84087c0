{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "config" -}}
{{ toPrettyJson .Values.config }}
{{- end }}

{{- /* The name changes with the content, so that a change is a rolling update and old pods keep their own config. */}}
{{- define "configName" -}}
{{ .Release.Name }}-config-{{ include "config" . | sha256sum | trunc 8 }}
{{- end }}

{{- /* HOST:PORT of the control address. */}}
{{- define "controlBind" -}}
{{ contains ":" .Values.address | ternary (printf "[%s]" .Values.address) .Values.address }}:9000
{{- end }}

{{- /* All environment variables by name; those of the values win. */}}
{{- define "env" -}}
{{- $ours := dict
      "OVMS_REST_CONTROL_BIND" (include "controlBind" .)
      "OVMS_REST_MODEL_CONTROL" "none"
      "OVMS_REST_METRICS_ENABLE" "true"
      "GUNICORN_CMD_ARGS" (printf "--graceful-timeout %d" (int .Values.gracefulTimeoutSeconds)) -}}
{{- range $name, $value := merge (dict) .Values.env $ours }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- /* Integral and equal: a pod keeps its cores where the kubelet's CPU manager is static, and each has a worker. */}}
{{- define "resources" -}}
requests:
  cpu: {{ int .Values.cpu }}
  memory: {{ .Values.memory }}
limits:
  cpu: {{ int .Values.cpu }}
  memory: {{ .Values.memory }}
{{- end }}

{{- define "containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop:
    - ALL
readOnlyRootFilesystem: true
{{- end }}
